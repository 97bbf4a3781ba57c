"""What may be set of an answer: names, kinds and bounds, from text or JSON, for chat and session files."""

import math
from dataclasses import dataclass, replace
from typing import Any

from .chat import Chat
from .errors import CnqError, listed

RANDOM = 0xFFFFFFFF  # llama.cpp's word for another seed each time


@dataclass(frozen=True)
class Param:
    """kind: int or float. least, most: bounds, both allowed."""

    kind: type
    least: float
    most: float
    what: str


PARAMS = {
    "temperature": Param(float, 0, 100, "0 = always the likeliest token"),
    "top_k": Param(int, 0, 1 << 30, "choose among so many tokens; 0 = all"),
    "top_p": Param(float, 0, 1, "choose among the likeliest of this probability together"),
    "min_p": Param(float, 0, 1, "least probability, as a part of the likeliest's"),
    "repeat_penalty": Param(float, 0.01, 10, "above 1: the last 64 tokens become less likely"),
    "seed": Param(int, 0, RANDOM, "a number = the same answer each time"),
    "max_tokens": Param(int, 1, 1 << 30, "of one answer"),
}


def current(chat: Chat) -> dict[str, int | float]:
    return {name: chat.max_tokens if name == "max_tokens" else getattr(chat.sampling, name) for name in PARAMS}


def change(chat: Chat, values: dict[str, Any]) -> None:
    """Set parameters, given as numbers or as text: all of them or none. Raises CnqError for a wrong name or value."""
    sound = checked(values)
    chat.max_tokens = int(sound.pop("max_tokens", chat.max_tokens))
    chat.sampling = replace(chat.sampling, **sound)


def checked(values: dict[str, Any]) -> dict[str, Any]:
    """The values as numbers. Raises CnqError for a wrong name or value."""
    return {name: _checked(name, value) for name, value in values.items()}


def shown(name: str, value: float) -> str:
    return "random" if name == "seed" and value == RANDOM else f"{value:g}" if isinstance(value, float) else str(value)


def _checked(name: str, value: Any) -> Any:
    if name not in PARAMS:
        raise CnqError(f"there is no parameter {name}; there are {listed(PARAMS, 9)}.")
    param = PARAMS[name]
    if name == "seed" and value == "random":
        return RANDOM
    try:
        number = param.kind(value)
        if not isinstance(value, str | int | float) or math.isnan(number) or not param.least <= number <= param.most:
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        kind = "a whole number" if param.kind is int else "a number"
        bounds = f"{param.least:g} to {param.most:g}" if param.most < 1 << 30 else f"{param.least:g} or more"
        raise CnqError(f"{name}={value}: expected {kind}, {bounds}.") from None
    return number
