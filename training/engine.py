"""A Hugging Face checkpoint, with LoRA adapters or without, that answers in cnq's own prompt formats, on a GPU or a CPU.

    engine = LlamaEngine("chinese-alpaca-2-7b/", lora=["my-adapter/"])
    engine.generate([{"role": "user", "content": "你好"}], temperature=0.2)

The prompt is the one that cnq chat gives the converted model, token by token, and sampling takes the same steps in the same
order: penalties, top-k, top-p, min-p, temperature.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import has_file

from cnq import prompts
from cnq.chat import Style, style_of, until
from cnq.engine.model import Sampling
from cnq.errors import CheckpointError, CnqError, EngineError, PromptError, VocabMismatch
from cnq.prompts import Message

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


class LlamaEngine:
    """style: how to talk with the model; None when it has no chat template and no format was named."""

    def __init__(
        self,
        model: str | Path,
        lora: str | Path | Sequence[str | Path] | None = None,
        *,
        tokenizer: str | Path | None = None,
        format: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        load_in_kbits: int = 16,
    ):
        """model, lora: directories or hub ids; adapters are merged in their order. tokenizer: default is that of the last
        adapter that has one, else the model's. format: of the prompt; None = the tokenizer's chat template.
        device: auto = all GPUs, else the CPU. dtype: auto = the checkpoint's; on a CPU float32. load_in_kbits: 16, or 8 or 4
        with bitsandbytes, where a single adapter stays beside the weights.

        Raises CheckpointError (missing, damaged, or they do not fit together), VocabMismatch, PromptError (no such format),
        EngineError (bitsandbytes is missing, or cannot do this).
        """
        loras = [str(part) for part in ([lora] if isinstance(lora, str | Path) else lora or ())]
        if load_in_kbits != 16:
            _require_bitsandbytes(loras)
        source = str(tokenizer or next((part for part in reversed(loras) if _has_tokenizer(part)), model))
        self.tokenizer: Any = _loaded(source, lambda: AutoTokenizer.from_pretrained(source, trust_remote_code=False))
        template = self.tokenizer.chat_template
        self.style: Style | None = None
        if format or isinstance(template, str):
            self.style = style_of(_fields(self.tokenizer), Path(source), format)
        device = _device() if device == "auto" else device
        options = _options(device, dtype, load_in_kbits)
        loader = AutoModelForCausalLM.from_pretrained
        self.model: Any = _loaded(str(model), lambda: loader(str(model), trust_remote_code=False, **options))
        for part in loras:
            self.model = _with_lora(self.model, part, merged=load_in_kbits == 16)
        self._require_rows(source, str(model))
        self.model.eval()
        self._ends = self._end_tokens()

    def prompt_tokens(self, prompt: Sequence[Message] | str) -> list[int]:
        """A conversation in the prompt format, or a text as it is, with exactly one bos in front if the model wants one."""
        adds_bos = self.tokenizer("").input_ids[:1] == [self.tokenizer.bos_token_id]
        text = prompt if isinstance(prompt, str) else self.prompt_text(prompt)
        if adds_bos and not isinstance(prompt, str):
            text = text.removeprefix(self.tokenizer.bos_token)
        return list(self.tokenizer(text).input_ids)

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The conversation as the model reads it. Raises PromptError: no format is known, or it refuses the conversation."""
        if not self.style:
            known = "|".join(prompts.FORMATS)
            raise PromptError(f"this model has no chat template. Name the format it was trained with: --format {known}")
        bos, eos = self.tokenizer.bos_token or "", self.tokenizer.eos_token or ""
        return prompts.render(self.style.jinja, messages, bos=bos, eos=eos)

    def generate(self, prompt: Sequence[Message] | str, *, max_new_tokens: int = 512, **sampling: Any) -> str:
        """The answer to a conversation, or how a text goes on. sampling: fields of cnq's Sampling, e.g. temperature=0;
        the others are as the authors of the prompt format set them.

        Raises EngineError when the prompt is too long, PromptError.
        """
        return "".join(self.stream(prompt, max_new_tokens=max_new_tokens, **sampling)).rstrip()

    def stream(self, prompt: Sequence[Message] | str, *, max_new_tokens: int = 512, **sampling: Any) -> Iterator[str]:
        """What generate answers, in pieces of whole characters as they come."""
        talk = not isinstance(prompt, str)
        style = self.style if talk else None
        how = replace(style.sampling if style else Sampling(), **sampling)
        if how.grammar or how.logit_bias:
            raise EngineError("grammar and logit_bias are for converted models: cnq serve. Leave them out.")
        started = not talk
        texts = _texts(self.tokenizer, self._tokens(self.prompt_tokens(prompt), how, max_new_tokens))
        for piece in until(style.stop if style else (), texts):
            piece = piece if started else piece.lstrip()
            started = started or bool(piece)
            if piece:
                yield piece

    def _tokens(self, prompt: list[int], sampling: Sampling, max_new_tokens: int) -> Iterator[int]:
        """The answer's tokens, without the one that ends it. Ends when the context is full."""
        n_ctx = getattr(self.model.config, "max_position_embeddings", None) or len(prompt) + max_new_tokens
        if not prompt or len(prompt) >= n_ctx:
            raise EngineError(f"the prompt has {len(prompt)} tokens, the context {n_ctx}. Shorten it.")
        pick = _sampler(sampling, self.model.device)
        ids = torch.tensor([prompt], device=self.model.device)  # (1, tokens so far)
        step, cache = ids, None
        for _ in range(min(max_new_tokens, n_ctx - len(prompt))):
            with torch.inference_mode():
                out = self.model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                step = pick(ids, out.logits[:, -1].float())
                ids = torch.cat([ids, step], 1)
            if (token := int(step)) in self._ends:
                return
            yield token

    def _end_tokens(self) -> set[int]:
        """What the checkpoint names as its end, and what ends an answer in the prompt format where that is one token."""
        config = getattr(self.model, "generation_config", None)
        named = [self.tokenizer.eos_token_id, getattr(config, "eos_token_id", None)]
        known = self.tokenizer.get_vocab()
        stops = [self.style.end, *(known.get(stop) for stop in self.style.stop)] if self.style else []
        ends = [end for some in (*named, *stops) for end in (some if isinstance(some, list) else [some])]
        return {end for end in ends if end is not None}

    def _require_rows(self, source: str, model: str) -> None:
        tokens, rows = len(self.tokenizer), self.model.get_input_embeddings().weight.shape[0]
        if tokens > rows:
            raise VocabMismatch(
                f"{source} has {tokens} tokens, the embeddings of {model} {rows} rows: a tokenizer of another model, or "
                "of an adapter that was not named. Name the adapter (--lora), or the model's own tokenizer (--tokenizer)."
            )


def _fields(tokenizer: Any) -> dict[str, Any]:
    """What the GGUF says of a tokenizer, as far as it matters for where answers end."""
    ids = {f"tokenizer.ggml.{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos")}
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return {"tokenizer.chat_template": tokenizer.chat_template, "tokenizer.ggml.tokens": tokens, **ids}


def _loaded(name: str, load: Any) -> Any:
    """Call what loads `name`. Raises CheckpointError with the first line of what transformers or PEFT say."""
    try:
        return load()
    except CnqError:
        raise
    except Exception as error:  # of half a dozen libraries, which read files from anywhere
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CheckpointError(f"{name} could not be loaded: {reason}. Expected a model's directory or a hub id.") from error


def _has_tokenizer(source: str) -> bool:
    return any(_loaded(source, lambda name=name: has_file(source, name)) for name in _TOKENIZER_FILES)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def _options(device: str, dtype: str, load_in_kbits: int) -> dict[str, Any]:
    """For from_pretrained. On several GPUs the layers are shared out."""
    options: dict[str, Any] = {"dtype": "float32" if dtype == "auto" and device == "cpu" else dtype}
    options["device_map"] = "auto" if device == "cuda" and torch.cuda.device_count() > 1 else device
    if load_in_kbits == 8:
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif load_in_kbits == 4:
        compute = torch.bfloat16 if device != "cpu" else torch.float32
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
        )
    return options


def _require_bitsandbytes(loras: Sequence[str]) -> None:
    if find_spec("bitsandbytes") is None:
        raise EngineError("--load-in-kbits 8 or 4 needs bitsandbytes: pip install bitsandbytes. Or load in 16 bits.")
    if len(loras) > 1:
        raise EngineError(
            "several adapters cannot be laid over weights of 8 or 4 bits. Merge them first: "
            "python -m training.merge_lora BASE LORA... OUT"
        )


def _with_lora(model: Any, lora: str, *, merged: bool) -> Any:
    """The model with an adapter. One that brings embeddings of its own, for a longer vocabulary, makes room for them."""
    import peft

    def load() -> Any:
        rows = {
            tensor.shape[0]
            for name, tensor in peft.utils.load_peft_weights(lora, device="cpu").items()
            if name.endswith(("embed_tokens.weight", "lm_head.weight"))
        }
        if len(rows) > 1:
            raise CheckpointError(
                f"{lora}: its embed_tokens and lm_head have {sorted(rows)} rows, expected as many. Train it again."
            )
        if rows and rows != {model.get_input_embeddings().weight.shape[0]}:
            model.resize_token_embeddings(rows.pop(), mean_resizing=False)
        return peft.PeftModel.from_pretrained(model, lora)

    whole = _loaded(lora, load)
    return whole.merge_and_unload() if merged else whole


def _sampler(sampling: Sampling, device: torch.device) -> Any:
    """What picks the next token, (1, 1), from the tokens before it and their logits (1, n_vocab), as llama.cpp's chain does."""
    steps = LogitsProcessorList()
    if sampling.temperature > 0:
        if sampling.top_k > 0:
            steps.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            steps.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p > 0:
            steps.append(MinPLogitsWarper(sampling.min_p))
        steps.append(TemperatureLogitsWarper(sampling.temperature))
    random = torch.Generator(device)
    if sampling.seed == Sampling().seed:
        random.seed()
    else:
        random.manual_seed(sampling.seed)

    def pick(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        logits = _penalized(logits, ids[0, -sampling.repeat_last_n :] if sampling.repeat_last_n else ids[0, :0], sampling)
        if sampling.temperature <= 0:
            return logits.argmax(-1, keepdim=True)
        return torch.multinomial(steps(ids, logits).softmax(-1), 1, generator=random)

    return pick


def _penalized(logits: torch.Tensor, recent: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits (1, n_vocab) with those of the tokens in `recent` lowered: llama_sampler_penalties."""
    tokens, counts = recent.unique(return_counts=True)
    known = logits[0, tokens]
    known = torch.where(known <= 0, known * sampling.repeat_penalty, known / sampling.repeat_penalty)
    logits[0, tokens] = known - counts * sampling.frequency_penalty - sampling.presence_penalty
    return logits


def _texts(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """Tokens to text, as soon as characters are whole.

    A token's text depends on the one before it (spaces at the beginning), and is known by what it adds to that one's.
    """
    ids: list[int] = []
    start = shown = 0  # ids[start:shown] is context, ids[shown:] not shown yet
    decode = lambda part: tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)  # noqa: E731
    for token in tokens:
        ids.append(token)
        before, text = decode(ids[start:shown]), decode(ids[start:])
        if len(text) > len(before) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(before) :]
            start, shown = shown, len(ids)
    if rest := decode(ids[start:])[len(decode(ids[start:shown])) :]:
        yield rest
