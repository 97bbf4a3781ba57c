"""OpenAI's replies, whole or in chunks. Source: openai-python's types for chat completions, completions and embeddings."""

import base64
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..answer import End, Piece, Scored

Json = dict[str, Any]


class Reply(ABC):
    """One reply of a model named `model`. raw: the bytes of a token."""

    kind, part, prefix = "", "", ""

    def __init__(self, model: str, n_prompt: int, raw: Callable[[int], bytes], *, usage: bool = False):
        """usage: whether chunks tell it, in one of its own at the end, as stream_options.include_usage asks for."""
        self._head: Json = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._n_prompt, self._raw, self._with_usage = n_prompt, raw, usage

    def whole(self, pieces: Sequence[Piece], end: End) -> Json:
        text = "".join(piece.text for piece in pieces)
        scored = [s for piece in pieces for s in piece.scored]
        choice = {"index": 0, **self._said(text), "logprobs": self._scores(scored), "finish_reason": end.reason}
        return {**self._head, "object": self.kind, "choices": [choice], "usage": self._usage(end)}

    def chunks_before(self) -> list[Json]:
        return []

    def chunk(self, piece: Piece) -> Json:
        return self._chunk(self._added(piece.text), self._scores(piece.scored))

    def chunks_after(self, end: End) -> list[Json]:
        last = [self._chunk(self._added(None), None, end.reason)]
        return [*last, self._chunk_head() | {"choices": [], "usage": self._usage(end)}] if self._with_usage else last

    def _chunk(self, added: Json, scores: Json | None, reason: str | None = None) -> Json:
        choice = {"index": 0, **added, "logprobs": scores, "finish_reason": reason}
        return self._chunk_head() | {"choices": [choice]} | ({"usage": None} if self._with_usage else {})

    def _chunk_head(self) -> Json:
        return {**self._head, "object": self.part}

    def _usage(self, end: End) -> Json:
        return {"prompt_tokens": self._n_prompt, "completion_tokens": end.n_tokens,
                "total_tokens": self._n_prompt + end.n_tokens,
                "prompt_tokens_details": {"cached_tokens": end.n_held}}  # fmt: skip

    def _text(self, token: int) -> str:
        return self._raw(token).decode("utf-8", "replace")

    @abstractmethod
    def _said(self, text: str) -> Json: ...

    @abstractmethod
    def _added(self, text: str | None) -> Json:
        """text: None = nothing more."""

    @abstractmethod
    def _scores(self, scored: Sequence[Scored]) -> Json | None: ...


class ChatReply(Reply):
    kind, part, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def chunks_before(self) -> list[Json]:
        return [self._chunk({"delta": {"role": "assistant", "content": ""}}, None)]

    def _said(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _added(self, text: str | None) -> Json:
        return {"delta": {} if text is None else {"content": text}}

    def _scores(self, scored: Sequence[Scored]) -> Json | None:
        if not scored:
            return None
        told = [self._score(s.token, s.logprob) | {"top_logprobs": [self._score(*t) for t in s.top]} for s in scored]
        return {"content": told, "refusal": None}

    def _score(self, token: int, logprob: float) -> Json:
        return {"token": self._text(token), "logprob": logprob, "bytes": list(self._raw(token))}


class CompletionReply(Reply):
    kind, part, prefix = "text_completion", "text_completion", "cmpl"

    def _said(self, text: str) -> Json:
        return {"text": text}

    def _added(self, text: str | None) -> Json:
        return {"text": text or ""}

    def _scores(self, scored: Sequence[Scored]) -> Json | None:
        if not scored:
            return None
        return {"tokens": [self._text(s.token) for s in scored], "token_logprobs": [s.logprob for s in scored],
                "top_logprobs": [{self._text(token): logprob for token, logprob in s.top} for s in scored],
                "text_offset": [s.at for s in scored]}  # fmt: skip


def embeddings(model: str, vectors: Sequence[np.ndarray], n_tokens: int, encoding: str) -> Json:
    """encoding: float, or base64 of little-endian float32, which OpenAI's Python client asks for by itself."""

    def told(vector: np.ndarray) -> Any:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode() if encoding == "base64" else vector.tolist()

    data = [{"object": "embedding", "index": i, "embedding": told(vector)} for i, vector in enumerate(vectors)]
    return {"object": "list", "model": model, "data": data, "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens}}
