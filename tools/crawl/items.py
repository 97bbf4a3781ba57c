"""The prompt that asks for instructions, and the reply to it, read as strictly as it has to be."""

import json
import random
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, StringConstraints, ValidationError, model_validator
from pydantic_core import PydanticCustomError

_SUBJECTS = tomllib.loads(Path(__file__).with_name("subjects.toml").read_text(encoding="utf-8"))
TOPICS: list[str] = _SUBJECTS["topics"]
TASKS: dict[str, str] = _SUBJECTS["tasks"]
_DRAWN = 10  # of topics and of tasks for one request
_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_DAMAGED = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ufffe\uffff]")
_NO_INPUT = re.compile(r"[<(（【\[]?\s*(无|无输入|没有|空|none|null|n/a|no ?input)\s*[>)）】\]]?", re.I)

_PROMPT = """\
请编写 {n} 条互不相同的数据，用来训练一个中文助手。每条有三个部分：
- instruction：用户提出的要求。
- input：完成要求所需的材料，如一段文字、一段代码、一组数据；不需要材料时写空字符串。
- output：助手的回答。

从下面的话题和任务中选用，尽量都用到：
话题：{topics}。
任务：
{tasks}

要求：
1. 除翻译、外语或代码需要外，一律使用简体中文。
2. 措辞、句式和难度要有变化，有疑问句也有祈使句；不要只换几个词重复同一个要求。
3. instruction 用一两句话说完，不含材料；input 是具体、完整的材料，不写占位符，不超过 {input_limit} 字。
4. output 正确、完整、直接，少于 {output_limit} 字。
5. 助手只能读写文字。看图、听录音、上网查询、知道现在的时间、代人办事、有害或违法的要求，output 要礼貌地拒绝，并说明原因。
6. 只输出一个 JSON 数组，不加解释，格式为：
[{{"instruction": "…", "input": "…", "output": "…"}}]
"""


def prompt(n: int, draw: random.Random) -> str:
    """A request for `n` items, of topics, tasks and lengths that `draw` chooses."""
    tasks = draw.sample(list(TASKS.items()), _DRAWN)
    return _PROMPT.format(
        n=n,
        topics="、".join(draw.sample(TOPICS, _DRAWN)),
        tasks="\n".join(f"- {name}：{what}" for name, what in tasks),
        input_limit=draw.randint(80, 120),
        output_limit=draw.randint(128, 512),
    )


def _text_of_none(value: Any) -> Any:
    return "" if value is None or (isinstance(value, str) and _NO_INPUT.fullmatch(value.strip())) else value


class Item(BaseModel):
    """One record of Alpaca's form. Lengths are in characters, about three times what is asked for: models overrun a little."""

    instruction: Annotated[str, StringConstraints(strip_whitespace=True, min_length=4, max_length=300)]
    input: Annotated[str, StringConstraints(strip_whitespace=True, max_length=400), BeforeValidator(_text_of_none)] = ""
    output: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=1500)]

    @model_validator(mode="after")
    def _legible(self) -> "Item":
        if _DAMAGED.search(self.instruction + self.input + self.output):
            raise PydanticCustomError("damaged", "control or replacement characters")
        if not _HAN.search(self.instruction):
            raise PydanticCustomError("not_chinese", "an instruction without Chinese characters")
        return self


# pydantic's names for what is wrong -> ours; anything else is a field that is missing, empty or no text
_REASONS = {"string_too_long": "too long", "damaged": "damaged characters", "not_chinese": "not Chinese",
            "string_unicode": "damaged characters"}  # fmt: skip


def read(reply: str) -> Iterator[Item | str]:
    """What a reply holds: items, and for those that are none the reason. Prose, code fences and an unfinished item are passed
    over; the array around the items may be missing, nested or broken."""
    for record in _records(reply):
        try:
            yield Item.model_validate(record)
        except ValidationError as error:
            yield _REASONS.get(error.errors()[0]["type"], "incomplete")


def _records(reply: str) -> Iterator[dict[str, Any]]:
    decoder = json.JSONDecoder(strict=False)  # models write line breaks into strings
    at = reply.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(reply, at)
            yield from list(_within(value))
        except (ValueError, RecursionError):  # no JSON, or its end is missing: the next brace may open a whole item
            end = at + 1
        at = reply.find("{", end)


def _within(value: Any) -> Iterator[dict[str, Any]]:
    """The records in a JSON value: {"data": [{…}, {…}]} holds two."""
    if isinstance(value, dict):
        inner = [v for v in value.values() if isinstance(v, dict | list)]
        if "instruction" in value or (value and not inner):
            yield value
        else:
            yield from (found for v in inner for found in _within(v))
    elif isinstance(value, list):
        yield from (found for v in value for found in _within(v))
