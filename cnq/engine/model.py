"""A GGUF model in memory: text to tokens and back, logits, and sampling token by token."""

import copy
import ctypes
import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import compress, count
from operator import ne
from pathlib import Path
from types import TracebackType
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as lib
import numpy as np

from ..errors import EngineError, GgufError, Interrupted, SessionError, listed
from ..files import replacing
from ..fingerprint import fingerprint
from ..gguf_file import TYPE_BY_NAME, GgufFile
from ..machine import physical_cores
from ..prompts import token_text
from ..tuning import PLAIN, Tuned
from . import ggml, state
from .sampler import Sampler, Sampling

_log: list[str] = []  # llama.cpp's last lines; it tells the reason of a failure nowhere else


@lib.llama_log_callback
def _on_log(level: int, text: bytes, user_data: object) -> None:
    _log.append(text.decode("utf-8", "replace"))
    del _log[:-40]


lib.llama_log_set(_on_log, ctypes.c_void_p(0))
lib.llama_backend_init()
# A llama-cpp-python compiled with AMX crashes in its first matrix product on many Xeons (ggml-org/llama.cpp issue 20824).
# `make setup` compiles without; for other builds the repacked weights, which is where AMX lives, are done without.
_AMX = b"AMX_INT8 = 1" in lib.llama_print_system_info()


_DEEP = 4096  # bytes of text from which on a tokenizer of regular expressions may need more stack than a thread has
_STACK = 512  # bytes of stack for each byte of text: std::regex recurses, and 160 to 330 were seen
_stack_size = threading.Lock()  # threading knows one size, for all threads to come


class Model:
    """A model with one sequence of context. Use it in a `with`, or call close()."""

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int = 0,
        n_batch: int = 0,
        n_threads: int = 0,
        tuned: Tuned = PLAIN,
        exact: bool = False,
        writable: bool = False,
        watch: Callable[[ggml.Tensor, bool], bool] | None = None,
        stop: Callable[[], bool] | None = None,
    ):
        """n_ctx: tokens; 0 = what the model was trained with. n_batch: tokens run at once; 0 = tuned.batch.

        tuned: how to run it, e.g. tuning.best(path). n_threads: wins over tuned's; 0 = tuned's.
        exact: attention in float32, to compare with other implementations; llama.cpp's own choice rounds to float16.
        writable: the weights lie in this process's own memory, in the file's form: for weights.Weights.
        watch: llama.cpp's evaluation callback. Asked (tensor, True) whether a result is wanted; shown it with False, it
        may return False to end the pass. What it raises comes out of the call that ran the pass.
        stop: asked after every operation whether to give up, in the thread that computes; the pass then raises EngineError.

        Raises GgufError (no GGUF, cut short), EngineError with llama.cpp's words.
        """
        file = GgufFile(path)  # a file that is no GGUF is refused here, before native code sees it
        _refuse_fatal(file)
        self.path, self.fields, self._file = path, file.fields, file
        self._ctx, self._forked = None, False
        params = lib.llama_model_default_params()
        params.use_extra_bufts = tuned.repack and not _AMX and not writable
        mapped = lib.LLAMA_LOAD_MODE_MMAP_MLOCK if tuned.mlock else lib.LLAMA_LOAD_MODE_AUTO
        params.load_mode = lib.LLAMA_LOAD_MODE_NONE if writable else mapped
        self._model = lib.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise EngineError(f"llama.cpp cannot load {path}: {_complaint()}")
        context = lib.llama_context_default_params()
        context.n_ctx = n_ctx
        _tune(context, replace(tuned, flash_attn=False, type_kv="F32") if exact else tuned, n_batch, n_threads)
        self._watch_errors: list[BaseException] = []
        self._watched = watch is not None
        if watch:
            context.cb_eval = lib.ggml_backend_sched_eval_callback(_watcher(watch, self._watch_errors))
        self._flag = None if stop else ggml.Flag()
        if stop:
            context.abort_callback = lib.ggml_abort_callback(lambda user_data: stop())
        self._params = context  # and what it refers to
        self._begin()
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.n_vocab = int(lib.llama_vocab_n_tokens(self._vocab))
        self.bos = int(lib.llama_vocab_bos(self._vocab))
        self.adds_bos = bool(lib.llama_vocab_get_add_bos(self._vocab))
        self._adds_eos = bool(lib.llama_vocab_get_add_eos(self._vocab))
        self._no_bytes = _bytes_without_token(file)

    def _begin(self) -> None:
        """An empty context for the weights."""
        if self._flag:
            self._flag.give_to(self._params)
        self._ctx = lib.llama_init_from_model(self._model, self._params)
        if not self._ctx:
            self.close()
            raise EngineError(
                f"llama.cpp cannot make room for a context of {self._params.n_ctx} tokens: {_complaint()} Try a smaller --ctx."
            )
        self.n_ctx: int = int(lib.llama_n_ctx(self._ctx))
        self.n_batch: int = int(self._params.n_batch)
        self._batch: _Batch = _Batch(self.n_batch)
        self._memory: object = lib.llama_get_memory(self._ctx)
        self._seen: list[int] = []  # tokens whose keys and values are in the context

    def fork(self, tuned: Tuned | None = None) -> "Model":
        """Another context on the same weights, which may be used in another thread. Close it before this one.

        tuned: how it runs, but for mlock and repack, which the weights have in common; None = as this one.
        """
        twin = copy.copy(self)
        twin._ctx, twin._forked, twin._flag = None, True, self._flag and ggml.Flag()
        if tuned:
            twin._params = type(self._params).from_buffer_copy(self._params)  # what it refers to, this one holds
            _tune(twin._params, tuned, 0, 0)
        twin._begin()
        return twin

    def embedder(self) -> "Model":
        """A fork whose passes give hidden states: for `embedding`."""
        twin = copy.copy(self)
        twin._ctx, twin._forked, twin._flag = None, True, self._flag and ggml.Flag()
        twin._params = type(self._params).from_buffer_copy(self._params)
        twin._params.embeddings, twin._params.pooling_type = True, lib.LLAMA_POOLING_TYPE_NONE
        twin._params.n_batch = twin._params.n_ubatch = 128  # llama.cpp keeps the logits of a whole batch beside them
        twin._begin()
        return twin

    def interrupt(self) -> None:
        """From any thread: have the pass that runs now, or the next one, raise Interrupted. Until `resume`."""
        assert self._flag
        self._flag.set(True)

    def resume(self) -> None:
        assert self._flag
        self._flag.set(False)

    @property
    def n_threads(self) -> int:
        """Threads it was made to compute in."""
        return int(self._params.n_threads)

    def close(self) -> None:
        if self._ctx:
            lib.llama_free(self._ctx)
        if self._model and not self._forked:
            lib.llama_model_free(self._model)
        self._ctx = self._model = None

    def use_threads(self, n_threads: int) -> None:
        """From now on compute in so many threads."""
        lib.llama_set_n_threads(self._ctx, n_threads, n_threads)

    def share_threads(self, parts: int) -> None:
        """From now on compute in one of so many parts of the threads it was made to compute in, prompts and answers."""
        p = self._params
        lib.llama_set_n_threads(self._ctx, max(1, p.n_threads // parts), max(1, p.n_threads_batch // parts))

    @property
    def context_bytes(self) -> int:
        """About what a context takes at most: keys and values as float16, logits twice in llama.cpp and once here."""
        width = int(lib.llama_model_n_layer(self._model)) * int(lib.llama_model_n_embd(self._model))
        return 4 * self.n_ctx * width + 12 * min(self.n_batch, self.n_ctx) * self.n_vocab

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @cached_property
    def longest_token(self) -> int:
        """Bytes of text that no token stands for more than."""
        return max((len(text.encode("utf-8", "replace")) for text in self.fields.get("tokenizer.ggml.tokens", [])), default=1)

    def token_text(self, name: str) -> str:
        """The text of a special token: bos, eos."""
        return token_text(self.fields, name)

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """add_special: put bos (and eos) around, if the model says so. parse_special: read "<s>" and the like as tokens."""
        if self._no_bytes:
            raise EngineError(
                f"its vocabulary has no token for {listed(self._no_bytes)}, and llama.cpp aborts at characters that are in no "
                "token. Make the GGUF again from the model's own tokenizer."
            )
        raw = text.encode("utf-8", "surrogatepass")
        deep = len(raw) > _DEEP and self.fields.get("tokenizer.ggml.model") == "gpt2"
        for room in (len(raw) + 2, 3 * len(raw) + 4):  # a space that is no token of its own becomes three bytes
            ids = (lib.llama_token * room)()
            arguments = (self._vocab, raw, len(raw), ids, room, add_special, parse_special)
            n = _on_a_stack_of(_STACK * len(raw), lib.llama_tokenize, *arguments) if deep else lib.llama_tokenize(*arguments)
            if n >= 0:
                return list(ids[:n])
        raise EngineError(f"{len(raw)} bytes of text could not be tokenized.")

    def prompt(self, text: str, *, parse_special: bool) -> list[int]:
        """Tokens for the model to go on from: without the eos that some tokenizers put behind a text, which is for training."""
        ids = self.tokenize(text, add_special=True, parse_special=parse_special)
        return ids[:-1] if self._adds_eos else ids

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for: possibly part of a character. Control tokens stand for nothing."""
        room = 256
        while True:
            buffer = ctypes.create_string_buffer(room)
            n = lib.llama_token_to_piece(self._vocab, token, buffer, room, 0, False)
            if n >= 0:
                return buffer.raw[:n]
            room = -n

    def ends(self, token: int) -> bool:
        """Whether the token ends an answer: eos, eot, and what else llama.cpp counts as end of generation."""
        return bool(lib.llama_vocab_is_eog(self._vocab, token))

    def logits(self, tokens: Sequence[int], first: int = 0) -> np.ndarray:
        """(len(tokens) - first, n_vocab) float32: for each position from `first` on, the logits of the token after it.

        A sequence of its own: the context is forgotten before and after.
        """
        self._forget(0)
        out = np.empty((len(tokens) - first, self.n_vocab), np.float32)
        for start in range(0, len(tokens), self.n_batch):
            part = tokens[start : start + self.n_batch]
            wanted = max(0, min(len(part), start + len(part) - first))
            self._decode(part, start, wanted)
            if wanted:
                at = start + len(part) - wanted - first
                out[at : at + wanted] = np.ctypeslib.as_array(lib.llama_get_logits(self._ctx), (wanted, self.n_vocab))
        self._forget(0)
        return out

    def logits_in_place(self, tokens: Sequence[int], first: int = 0) -> np.ndarray:
        """The same of at most n_batch tokens, where llama.cpp has them: valid until the next call, to be read only."""
        self._forget(0)
        self._decode(tokens, 0, len(tokens) - first)
        self._forget(0)
        return np.ctypeslib.as_array(lib.llama_get_logits(self._ctx), (len(tokens) - first, self.n_vocab))

    def feed(self, tokens: Sequence[int]) -> None:
        """Run a sequence of its own for the watcher alone; every token is computed through all layers."""
        self._forget(0)
        for start in range(0, len(tokens), self.n_batch):
            part = tokens[start : start + self.n_batch]
            self._decode(part, start, len(part))
        self._forget(0)

    def feed_states(self, states: np.ndarray) -> None:
        """The same from hidden states (at most n_batch, hidden size) float32 in the place of the tokens' embeddings."""
        self._forget(0)
        states = np.ascontiguousarray(states, np.float32)
        self._run(self._batch.of_states(states), range(len(states)), 0)
        self._forget(0)

    def embedding(self, tokens: Sequence[int]) -> np.ndarray:
        """(hidden size,) float32 of length 1: the mean of the last layer's states over the tokens; of an `embedder` only.

        A sequence of its own. Raises EngineError when it does not fit into the context, and Interrupted.
        """
        if not tokens or len(tokens) > self.n_ctx:
            raise EngineError(f"the text has {len(tokens)} tokens, the context {self.n_ctx}. Shorten it, or raise --ctx.")
        self._forget(0)
        width = int(lib.llama_model_n_embd(self._model))
        total = np.zeros(width)
        for start in range(0, len(tokens), self.n_batch):
            part = tokens[start : start + self.n_batch]
            self._decode(part, start, len(part))
            total += np.ctypeslib.as_array(lib.llama_get_embeddings(self._ctx), (len(part), width)).sum(0, dtype=np.float64)
        self._forget(0)
        return np.asarray(total / (np.linalg.norm(total) or 1), np.float32)

    def next_logits(self, prompt: Sequence[int]) -> np.ndarray:
        """(n_vocab,) float32, valid until the next call. What the prompt has in common with the last is not computed again."""
        self._go_on(prompt)
        return self.last_logits()

    def last_logits(self) -> np.ndarray:
        """(n_vocab,) float32, valid until the next pass: of the token after the last one. While `generate` waits after a
        token, what that token was drawn from."""
        return np.ctypeslib.as_array(lib.llama_get_logits_ith(self._ctx, -1), (self.n_vocab,))

    def _go_on(self, prompt: Sequence[int]) -> None:
        """Bring the context to the end of the prompt."""
        if not prompt or len(prompt) >= self.n_ctx:
            raise EngineError(f"the prompt has {len(prompt)} tokens, the context {self.n_ctx}. Shorten it, or raise --ctx.")
        common = self.holds(prompt[:-1])
        self._forget(common)
        for start in range(common, len(prompt), self.n_batch):
            self._decode(prompt[start : start + self.n_batch], start, 1)

    @property
    def n_seen(self) -> int:
        """How many tokens are in the context; may be asked from another thread while the model computes."""
        return len(self._seen)

    def holds(self, tokens: Sequence[int]) -> int:
        """How many of the first tokens are in the context already."""
        differs = compress(count(), map(ne, tokens, self._seen))
        return next(differs, min(len(tokens), len(self._seen)))

    def read(self, tokens: Sequence[int]) -> None:
        """Bring the context to the end of the tokens, without logits: for what comes after them."""
        common = self.holds(tokens)
        self._forget(common)
        for start in range(common, len(tokens), self.n_batch):
            self._decode(tokens[start : start + self.n_batch], start, 0)

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights; see cnq.fingerprint."""
        return fingerprint(self._file).hex()

    @cached_property
    def identity(self) -> str:
        """Equal for contexts that can go on from each other's state: same weights, llama.cpp, and form of the cache."""
        p = self._params
        form = (llama_cpp.__version__, p.type_k, p.type_v, p.flash_attn_type, p.rope_freq_base, p.rope_freq_scale)
        return hashlib.sha256(f"{self.fingerprint} {form}".encode()).hexdigest()

    @property
    def state_bytes(self) -> int:
        """About what save_state writes now."""
        return int(lib.llama_state_seq_get_size(self._ctx, 0)) + 4 * len(self._seen)

    def save_state(self, path: Path) -> None:
        """Write the context, tokens with their keys and values, for load_state; `path` is replaced.

        Raises NoSpace, CnqError (not writable), EngineError (nothing in the context, or a kind of model without a plain cache).
        """
        if not self._seen:
            raise EngineError("the context is empty: there is no state to keep.")
        tokens = (lib.llama_token * len(self._seen))(*self._seen)
        with replacing(path, force=True, need=self.state_bytes) as partial:
            if not lib.llama_state_seq_save_file(self._ctx, os.fsencode(partial), 0, tokens, len(tokens)):
                raise EngineError(f"llama.cpp cannot write {partial}: {_complaint()}")
            state.seal(partial, bytes.fromhex(self.identity))

    def load_state(self, path: Path) -> int:
        """Take over a context that save_state wrote: the number of its tokens. Without it, the context stays as it is.

        Raises SessionError: damaged, of another model, longer than this context.
        """
        tokens = state.unsealed(path, bytes.fromhex(self.identity))
        if len(tokens) > self.n_ctx:
            raise SessionError(f"{path} holds {len(tokens)} tokens, the context {self.n_ctx}. Raise --ctx, or delete it.")
        self._forget(0)
        room, n = (lib.llama_token * len(tokens))(), ctypes.c_size_t()
        if not lib.llama_state_seq_load_file(self._ctx, os.fsencode(path), 0, room, len(tokens), ctypes.byref(n)):
            self._forget(0)
            raise SessionError(f"{path} was refused by llama.cpp: {_complaint()} Delete it: it will be computed again.")
        self._seen = tokens
        return len(tokens)

    def check(self, sampling: Sampling) -> None:
        """Raise EngineError for a grammar that `generate` could not follow."""
        Sampler(sampling, self._vocab, self.n_vocab, ()).close()

    def generate(self, prompt: Sequence[int], sampling: Sampling, max_tokens: int) -> Iterator[int]:
        """Yield the tokens of an answer, without the one that ends it.

        What the prompt has in common with the last one is not computed again. Ends when the context is full.
        Raises EngineError when the prompt leaves no room for an answer, or no token follows the grammar; Interrupted.
        """
        sampler = Sampler(sampling, self._vocab, self.n_vocab, prompt)
        try:
            self._go_on(prompt)
            for _ in range(min(max_tokens, self.n_ctx - len(prompt))):
                token = sampler.draw(self._ctx)
                if self.ends(token):
                    return
                yield token
                if len(self._seen) < self.n_ctx:
                    self._decode([token], len(self._seen), 1)
        finally:
            sampler.close()

    def _decode(self, tokens: Sequence[int], position: int, n_logits: int) -> None:
        """Run tokens at a position; the last `n_logits` of them get logits."""
        self._run(self._batch.filled(tokens, position, n_logits), tokens, position)

    def _run(self, batch: object, tokens: Sequence[int], position: int) -> None:
        with self._interrupt_kept():
            status = lib.llama_decode(self._ctx, batch)
        if self._watch_errors:
            error = self._watch_errors[0]
            self._watch_errors.clear()
            raise error
        if status == 2 and self._flag:  # aborted; what the pass had done of these tokens is forgotten
            raise Interrupted("the model was asked to stop.")
        if status:
            raise EngineError(f"llama.cpp could not run {len(tokens)} tokens at {position} of {self.n_ctx}: {_complaint()}")
        self._seen += tokens

    @contextmanager
    def _interrupt_kept(self) -> Iterator[None]:
        """Keep Ctrl-C for _decode too: raised where C enters `watcher`, before its try, it would be dropped by ctypes."""
        here = threading.current_thread() is threading.main_thread()
        if not self._watched or not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return

        def keep(number: int, frame: object) -> None:
            self._watch_errors.append(KeyboardInterrupt())

        signal.signal(signal.SIGINT, keep)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _forget(self, keep: int) -> None:
        """Drop all but the first `keep` tokens from the context."""
        lib.llama_memory_seq_rm(self._memory, 0, keep, -1)
        del self._seen[keep:]


class _Batch:
    """A llama_batch of one sequence, filled anew for every pass."""

    def __init__(self, room: int):
        self._token, self._pos, self._logits = ((kind * room)() for kind in (lib.llama_token, lib.llama_pos, ctypes.c_int8))
        own = ctypes.pointer(lib.llama_seq_id(0))
        n_seq_id, seq_id = (ctypes.c_int32 * room)(*[1] * room), (type(own) * room)(*[own] * room)
        self._batch = lib.llama_batch(0, self._token, None, self._pos, n_seq_id, seq_id, self._logits)
        self._states = lib.llama_batch(0, None, None, self._pos, n_seq_id, seq_id, self._logits)

    def filled(self, tokens: Sequence[int], position: int, n_logits: int) -> object:
        n = self._batch.n_tokens = len(tokens)
        self._token[:n] = tokens
        self._pos[:n] = range(position, position + n)
        self._logits[:n] = bytes(n - n_logits) + b"\1" * n_logits
        return self._batch

    def of_states(self, states: np.ndarray) -> object:
        """states: (n, hidden size) float32, contiguous; they must outlive the pass. All are asked for."""
        n = self._states.n_tokens = len(states)
        self._pos[:n], self._logits[:n] = range(n), b"\1" * n
        self._states.embd = states.ctypes.data_as(type(self._states.embd))
        return self._states


def _watcher(watch: Callable[[ggml.Tensor, bool], bool], errors: list[BaseException]) -> Callable[[int, bool, object], bool]:
    """The callback as C calls it: an exception must not cross native code, so it waits in `errors` for the pass to end.

    It does not refer to the model, which refers to it: a model that is closed and dropped gives back its file at once.
    """

    def watcher(address: int, ask: bool, user_data: object) -> bool:
        if errors:
            return False
        try:
            return watch(ggml.Tensor.from_address(address), ask)
        except BaseException as error:
            errors.append(error)
            return False

    return watcher


def _tune(context: Any, tuned: Tuned, n_batch: int, n_threads: int) -> None:
    """Put into llama.cpp's parameters of a context how it is to run."""
    context.n_batch = n_batch or tuned.batch
    context.n_ubatch = min(context.n_batch, tuned.batch)
    context.n_threads = n_threads or tuned.threads or physical_cores()
    context.n_threads_batch = n_threads or tuned.threads_batch or physical_cores()
    where_it_can, never = lib.LLAMA_FLASH_ATTN_TYPE_AUTO, lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context.flash_attn_type = where_it_can if tuned.flash_attn else never
    context.type_k = context.type_v = TYPE_BY_NAME[tuned.type_kv].id


def _refuse_fatal(file: GgufFile) -> None:
    """Raise GgufError for metadata that llama.cpp does not refuse, but aborts at (llama-model.cpp, llama-vocab.cpp)."""
    path, fields, arch = file.path, file.fields, file.arch
    experts = fields.get(f"{arch}.expert_count", 0)
    chosen = range(1, experts + 1) if experts in range(1, 1025) else range(1)
    epsilon = "attention.layer_norm_rms_epsilon"
    for key, default, sound, expected in (
        ("block_count", 1, range(1, 513).__contains__, "1 to 512"),
        ("expert_count", 0, range(1025).__contains__, "0 to 1024"),
        ("expert_used_count", 0, chosen.__contains__, f"{chosen[0]} to {chosen[-1]} of {experts} experts"),
        ("rope.scaling.type", "none", ("none", "linear", "yarn", "longrope").__contains__, "none, linear, yarn or longrope"),
        (epsilon, 0.0, lambda value: isinstance(value, float) and value >= 0, "0 or more"),
    ):
        value = fields.get(f"{arch}.{key}", default)
        if not all(map(sound, value if isinstance(value, list) else [value])):  # a list has one for each layer
            raise GgufError(f"{path} says {arch}.{key} = {value!r}, expected {expected}. Download or make it again.")
    tokens = fields.get("tokenizer.ggml.tokens", [])
    told = [str(t).partition("\0")[0] for t in tokens] if isinstance(tokens, list) else [""]  # as C reads them
    if not isinstance(tokens, list) or len(set(filter(None, told))) < len(told) - told.count(""):
        raise GgufError(f"{path} says tokenizer.ggml.tokens is not a list of different tokens. Download or make it again.")


def _bytes_without_token(file: GgufFile) -> list[str]:
    """Names of byte tokens that a SentencePiece vocabulary lacks: every text that has no other token is made of them."""
    if file.fields.get("tokenizer.ggml.model") != "llama":
        return []
    known = set(file.fields.get("tokenizer.ggml.tokens", []))
    return [name for byte in range(256) if (name := f"<0x{byte:02X}>") not in known and chr(byte) not in known]


def _on_a_stack_of(nbytes: int, function: Callable[..., int], *arguments: Any) -> int:
    """Call a function in a thread with so much stack; pages that it does not touch cost nothing."""
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(function(*arguments)))
    with _stack_size:
        before = threading.stack_size(nbytes + (1 << 20) & ~0xFFFF)
        try:
            thread.start()
        except RuntimeError as error:
            raise EngineError(
                f"there is no room for a stack of {nbytes} bytes to tokenize so long a text. Shorten it."
            ) from error
        finally:
            threading.stack_size(before)
    thread.join()
    return results[0]


def _complaint() -> str:
    """llama.cpp's last words that tell of trouble."""
    lines = "".join(_log).splitlines()
    told = [line.strip() for line in lines if "error" in line.lower() or "fail" in line.lower()]
    return (told or lines or ["no reason given."])[-1]
