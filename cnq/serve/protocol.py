"""OpenAI's requests as this server takes them, checked by pydantic, and its errors.

Source: openai-python's types and developers.openai.com's API reference. What would change the answer and is not supported is
refused by name, as is a parameter nobody knows; what only concerns OpenAI's own house (IGNORED) is ignored; null means that a
parameter was not given. top_k, min_p and repeat_penalty are llama.cpp's, named as its own server names them.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from ..engine.sampler import Sampling, json_grammar
from ..errors import CnqError

IGNORED = {"user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_options",
           "prompt_cache_retention", "parallel_tool_calls"}  # fmt: skip
_ONLY_NEUTRAL = {"n", "best_of", "echo", "suffix", "tools", "tool_choice", "modalities"}  # with the value that asks for nothing


class ApiError(CnqError):
    """An error as OpenAI's clients read it. param: the parameter at fault."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None, type: str = "invalid_request_error"):
        self.status, self.code, self.param, self.type = status, code, param, type
        super().__init__(message)

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, value: Any) -> Any:
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


class _Part(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    """Of a conversation. developer is what OpenAI calls system now."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]
    name: str = ""

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, value: Any) -> Any:
        """An answer may be sent back as it came from a client, with fields for what it did not hold."""
        return {k: v for k, v in value.items() if v not in (None, [])} if isinstance(value, dict) else value

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class _StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class _JsonSchema(_Strict):
    name: str = ""
    description: str = ""
    strict: bool = True
    json_schema: dict[str, Any] = Field(alias="schema")


class _Format(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_needed(self) -> "_Format":
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema belongs to the type json_schema")
        return self

    def grammar(self) -> str | None:
        """Raises EngineError for a schema that cannot be followed."""
        if self.type == "text":
            return None
        return json_grammar(self.json_schema.json_schema if self.json_schema else None)


_Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]


class Request(_Strict):
    """What chat completions and completions have in common."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 30)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = {}
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] = []
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    n: Literal[1] = 1

    @model_validator(mode="before")
    @classmethod
    def _without_ignored(cls, value: Any) -> Any:
        return {k: v for k, v in value.items() if k not in IGNORED} if isinstance(value, dict) else value

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, default: Sampling, n_vocab: int) -> Sampling:
        """What the request says, and `default` where it says nothing. Raises ApiError."""
        if wrong := [token for token in self.logit_bias if not 0 <= token < n_vocab]:
            raise ApiError(400, f"there is no token {wrong[0]}; the last one is {n_vocab - 1}.", code="invalid_value",
                           param="logit_bias")  # fmt: skip
        names = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.seed is not None:
            given["seed"] = self.seed % 0xFFFFFFFF  # 32 bits, but for llama.cpp's word for a random one
        grammar = self.grammar()
        return Sampling(**(vars(default) | given | {"logit_bias": tuple(self.logit_bias.items()), "grammar": grammar}))

    def grammar(self) -> str | None:
        return None


class ChatRequest(Request):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    response_format: _Format = _Format(type="text")
    modalities: list[Literal["text"]] = []
    tools: Annotated[list[Any], Field(max_length=0)] = []
    tool_choice: Literal["none", "auto"] = "none"

    @property
    def scores(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    def grammar(self) -> str | None:
        return self.response_format.grammar()


class CompletionRequest(Request):
    prompt: str | list[int] | Annotated[list[str | list[int]], Field(min_length=1, max_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Literal[1] = 1
    echo: Literal[False] = False
    suffix: Literal[""] = ""

    @property
    def text(self) -> str | list[int]:
        """The prompt, or its tokens."""
        nested = isinstance(self.prompt, list) and bool(self.prompt) and not isinstance(self.prompt[0], int)
        return self.prompt[0] if nested else self.prompt  # type: ignore[return-value]


class EmbeddingRequest(_Strict):
    input: str | list[int] | Annotated[list[str | list[int]], Field(min_length=1, max_length=2048)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    user: str = ""

    @property
    def texts(self) -> list[str | list[int]]:
        nested = isinstance(self.input, list) and bool(self.input) and not isinstance(self.input[0], int)
        return list(self.input) if nested else [self.input]  # type: ignore[arg-type, list-item]


_R = TypeVar("_R", bound=_Strict)


def parsed(kind: type[_R], body: bytes) -> _R:
    """The request in a body. Raises ApiError that names the first parameter at fault."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        wrong = max(error.errors(include_url=False), key=lambda e: len(e["loc"]))  # of a union, the branch that got furthest
    param = ".".join(str(part) for part in wrong["loc"] if not _is_of_pydantic(part)) or None
    said = repr(wrong["input"])
    said = said if len(said) <= 80 else said[:79] + "…"
    if wrong["type"] == "json_invalid":
        raise ApiError(400, f"the body is no JSON: {wrong['ctx']['error']}.", code="invalid_json")
    if wrong["type"] == "extra_forbidden":
        raise ApiError(400, f"{param} is not supported by this server.", code="unsupported_parameter", param=param)
    if wrong["loc"] and wrong["loc"][0] in _ONLY_NEUTRAL:
        raise ApiError(400, f"{param}: {said} is not supported by this server.", code="unsupported_parameter", param=param)
    told = "" if wrong["type"] == "missing" else f" It is {said}."
    raise ApiError(400, f"{param or 'the body'}: {wrong['msg']}.{told}", code="invalid_value", param=param)


def _is_of_pydantic(part: str | int) -> bool:
    """Pydantic names the branch of a union it looked at: str, list[...], constrained-str."""
    return isinstance(part, str) and (not part.replace("_", "").isalnum() or part in ("str", "int", "constrained"))
