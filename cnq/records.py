"""Files of text and of conversations as people have them. What a file holds is told by its content, not by an option."""

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CorpusError, listed
from .prompts import Message

SUFFIXES = (".json", ".jsonl", ".parquet")
EXPECTED = (
    "instruction and output (Alpaca), messages with role and content, conversations with from and value (ShareGPT), a list of "
    "role and text, or text"
)
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class Record:
    """A conversation, or a text that is none. where: file and place, for messages to the user."""

    where: str
    messages: tuple[Message, ...] = ()
    text: str | None = None


def files(paths: Iterable[Path], suffixes: tuple[str, ...]) -> list[Path]:
    """The files named, and those of the folders named (not of folders in them) with one of `suffixes`, by name.

    Raises CorpusError: no such path, a folder without such a file, nothing named.
    """
    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.is_file() and p.suffix in suffixes)
            if not inside:
                there = listed(sorted(p.name for p in path.iterdir())) or "nothing"
                raise CorpusError(f"{path} holds {there}. Expected files that end in {', '.join(suffixes)}.")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise CorpusError(f"{path} does not exist. Name a file or a folder of {', '.join(suffixes)}.")
    if not found:
        raise CorpusError(f"no files are named. Name files or folders of {', '.join(suffixes)}.")
    return found


def text(path: Path) -> str:
    """A whole file. Raises CorpusError: it cannot be read, is no text, or no UTF-8."""
    try:
        raw = path.read_bytes()
        _require_text(path, raw[:_CHUNK])
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise _no_utf8(path) from None


def lines(path: Path) -> Iterator[str]:
    """Its lines without their ends, one in memory at a time. Raises CorpusError as `text` does."""
    try:
        with path.open("rb") as file:
            _require_text(path, file.read(_CHUNK))
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                yield line.removesuffix("\n")
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise _no_utf8(path) from None


def _require_text(path: Path, raw: bytes) -> None:
    for bom, encoding in ((codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16")):
        if raw.startswith(bom):
            raise CorpusError(f"{path} is {encoding}, not UTF-8. Convert it: iconv -f {encoding} -t UTF-8 {path} > utf8.txt")
    if b"\0" in raw:
        raise CorpusError(f"{path} is no text: it has zero bytes. Expected .txt, .jsonl, .json or .parquet.")


def _no_utf8(path: Path) -> CorpusError:
    if _undecodable(path, "gb18030") is None:
        return CorpusError(f"{path} is GBK, not UTF-8. Convert it: iconv -f GB18030 -t UTF-8 {path} > utf8.txt")
    at = _undecodable(path, "utf-8")
    assert at is not None
    with path.open("rb") as file:
        file.seek(at)
        return CorpusError(f"{path} is no UTF-8 text: byte {at} is {file.read(1)[0]:#x}.")


def _undecodable(path: Path, encoding: str) -> int | None:
    """Place of the first byte that the encoding has no use for, with little memory; None where it is all well."""
    decoder = codecs.getincrementaldecoder(encoding)()
    at = 0
    with path.open("rb") as file:
        while True:
            chunk = file.read(_CHUNK)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return at - pending + error.start
            if not chunk:
                return None
            at += len(chunk)


def records(path: Path) -> Iterator[Record]:
    """The conversations and texts of a file: a JSON list, a JSON value a line, or parquet.

    Known are Alpaca's instruction, input and output, with system and history; messages of role and content; ShareGPT's
    conversations; lists of role and text, of which a list of one is plain text (chinese-llama-65b); lists of input and
    output (Chinese-Vicuna's chats); input and target (PromptCBLUE); text.

    Raises CorpusError, which names the record, when there is none, when one is no such thing, or for what `text` refuses.
    """
    nothing = True
    for where, value in _values(path):
        nothing = False
        try:
            record = _record(where, value)
            _require_whole(record)
            yield record
        except ValueError as error:
            raise CorpusError(f"{where} {error}.") from None
    if nothing:
        raise CorpusError(f"{path} holds no records. Expected {EXPECTED}.")


def _require_whole(record: Record) -> None:
    """JSON can spell out half of a character that takes two \\u, as cut emoji leave it; no tokenizer takes that."""
    for content in (record.text or "", *(m["content"] for m in record.messages)):
        try:
            content.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(content[error.start]):x}"
            raise ValueError(f"has half a character, {half}, behind {content[: error.start][-20:]!r}. Remove it") from None


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".parquet":
        return _numbered(path, "record", _parquet(path))
    content = text(path)
    if not content.strip():
        return iter(())
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # behind a whole value: one a line. Not splitlines(), which knows ends inside of texts
            return _by_line(path, content.split("\n"))
        raise CorpusError(f"{path} is no JSON: {error}.") from None
    if isinstance(value, dict) and path.suffix == ".jsonl":
        return iter([(f"{path}: line 1", value)])
    if not isinstance(value, list):
        raise CorpusError(f"{path} holds a {type(value).__name__}, expected a list of records (Alpaca json) or one a line.")
    if value and all(isinstance(v, dict) and v.keys() & {"role", "from"} for v in value):
        return iter([(str(path), value)])  # turns: it is one conversation
    return _numbered(path, "record", value)


def _numbered(path: Path, what: str, values: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{path}: {what} {number}", value) for number, value in enumerate(values, 1))


def _by_line(path: Path, content: list[str]) -> Iterator[tuple[str, Any]]:
    for where, line in _numbered(path, "line", content):
        if line.strip():
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise CorpusError(f"{where} is no JSON: {error}.") from None


def _parquet(path: Path) -> list[Any]:
    try:
        from datasets import Dataset
    except ImportError:
        raise CorpusError(f"{path} is parquet, which takes the datasets package: pip install datasets") from None
    return Dataset.from_parquet(str(path)).to_list()


def _record(where: str, value: Any) -> Record:
    """Raises ValueError with what is wrong, to stand behind `where`."""
    if isinstance(value, list):
        if len(value) == 1 and isinstance(value[0], dict) and isinstance(value[0].get("text"), str):
            return Record(where, text=value[0]["text"])
        return Record(where, _turns(value))
    if not isinstance(value, dict):
        raise ValueError(f"is a {type(value).__name__}; expected {EXPECTED}")
    for keys, read in _SHAPES:
        if keys <= value.keys():
            return Record(where, read(value))
    if isinstance(value.get("text"), str) and not value.keys() & {"role", "from"}:
        return Record(where, text=value["text"])
    raise ValueError(f"has neither text nor a conversation, but {listed(map(str, value)) or 'nothing'}; expected {EXPECTED}")


def _alpaca(value: dict[str, Any]) -> tuple[Message, ...]:
    history = value.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError("has a history that is no list of questions and answers in pairs")
    question = _text(value, "instruction")
    if value.get("input"):
        question += "\n" + _text(value, "input")
    rounds = [*history, [question, _text(value, "output")]]
    return (*_system(value), *_rounds(rounds))


def _input_output(value: dict[str, Any]) -> tuple[Message, ...]:
    questions, answers = value["input"], value["output"]
    if not isinstance(questions, list) or not isinstance(answers, list) or len(questions) != len(answers):
        raise ValueError("has input and output without instruction; expected instruction too, or as many inputs as outputs")
    return (*_system(value), *_rounds(zip(questions, answers, strict=True)))


def _rounds(rounds: Iterable[Iterable[Any]]) -> list[Message]:
    messages = [
        {"role": role, "content": content} for pair in rounds for role, content in zip(("user", "assistant"), pair, strict=True)
    ]
    if wrong := [m["content"] for m in messages if not isinstance(m["content"], str)]:
        raise ValueError(f"has a {type(wrong[0]).__name__} among its questions and answers; expected text")
    return messages


def _target(value: dict[str, Any]) -> tuple[Message, ...]:
    return (*_system(value), *_rounds([[_text(value, "input"), _text(value, "target")]]))


def _turns(turns: Any) -> tuple[Message, ...]:
    """Messages of role or from, and content, text or value."""
    if not isinstance(turns, list) or not turns:
        raise ValueError("is a conversation without turns" if turns == [] else f"has a {type(turns).__name__} for its turns")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not turn.keys() & {"role", "from"}:
            raise ValueError(f"has no role in turn {number}; expected {EXPECTED}")
        role = turn.get("role", turn.get("from"))
        content = next((turn[key] for key in ("content", "text", "value") if key in turn), None)
        if not isinstance(role, str) or role not in _ROLES:
            raise ValueError(f"has the role {role!r} in turn {number}; known are {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"has no text in turn {number}; expected content, text or value")
        messages.append({"role": _ROLES[role], "content": content})
    return tuple(messages)


def _system(value: dict[str, Any]) -> list[Message]:
    return [{"role": "system", "content": _text(value, "system")}] if value.get("system") else []


def _text(value: dict[str, Any], key: str) -> str:
    if key not in value:
        raise ValueError(f"has no {key}, but {listed(map(str, value))}")
    if not isinstance(value[key], str):
        raise ValueError(f"has a {type(value[key]).__name__} for its {key}; expected text")
    return value[key]


_SHAPES: tuple[tuple[set[str], Callable[[dict[str, Any]], tuple[Message, ...]]], ...] = (
    ({"messages"}, lambda value: (*_system(value), *_turns(value["messages"]))),
    ({"conversations"}, lambda value: (*_system(value), *_turns(value["conversations"]))),
    ({"instruction"}, _alpaca),
    ({"input", "output"}, _input_output),
    ({"input", "target"}, _target),
)
