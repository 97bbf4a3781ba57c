"""Files of conversations and text: every shape that people have, told by content, and what is refused by name."""

import json

import pytest

from cnq.errors import CorpusError
from cnq.records import SUFFIXES, files, lines, records, text

ROUND = [("user", "问"), ("assistant", "答")]
TALK = [("system", "短"), *ROUND, ("user", "再"), ("assistant", "好")]


def read(tmp_path, content, name="a.json"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(records(path))


def said(record):
    return [(m["role"], m["content"]) for m in record.messages]


def listed(*values):
    return json.dumps(values, ensure_ascii=False)


def by_line(*values):
    return "\n".join(json.dumps(value, ensure_ascii=False) for value in values)


def turns(talk, role="role", content="content", names=None):
    return [{role: (names or {}).get(who, who), content: what} for who, what in talk]


SHAREGPT = {"user": "human", "assistant": "gpt"}


@pytest.mark.parametrize(
    ("value", "want"),
    [
        ({"instruction": "问", "input": "", "output": "答"}, ROUND),
        ({"instruction": "问", "output": "答"}, ROUND),
        ({"instruction": "问", "input": None, "output": "答", "id": 7}, ROUND),
        ({"instruction": "翻译", "input": "hi", "output": "答"}, [("user", "翻译\nhi"), ("assistant", "答")]),
        ({"instruction": "再", "input": "", "output": "好", "system": "短", "history": [["问", "答"]]}, TALK),
        ({"instruction": "问", "output": "答", "history": [], "system": ""}, ROUND),
        ({"messages": turns(TALK)}, TALK),
        ({"conversations": turns(TALK, "from", "value", SHAREGPT)}, TALK),
        ({"conversations": turns(TALK[1:], "from", "value", SHAREGPT), "system": "短"}, TALK),
        (turns(TALK, content="text"), TALK),
        ({"input": ["问", "再"], "output": ["答", "好"]}, TALK[1:]),
        ({"input": "问", "target": "答", "task_type": "cls"}, ROUND),
    ],
)
@pytest.mark.parametrize("write", [listed, by_line])
def test_every_shape_of_conversation(tmp_path, value, want, write):
    first, second = read(tmp_path, write(value, value))
    assert said(first) == want == said(second)
    assert first.text is None
    assert first.where == f"{tmp_path / 'a.json'}: {'record' if write is listed else 'line'} 1"


@pytest.mark.parametrize("value", [{"text": "文"}, [{"role": "user", "text": "文"}], [{"text": "文"}]])
def test_plain_text(tmp_path, value):
    (record,) = read(tmp_path, by_line(value), "a.jsonl")
    assert (record.text, record.messages) == ("文", ())


def test_the_name_of_a_file_does_not_matter(tmp_path):
    assert [said(r) for r in read(tmp_path, listed({"input": "问", "target": "答"}), "a.jsonl")] == [ROUND]
    assert [said(r) for r in read(tmp_path, by_line(turns(ROUND, content="text")), "a.json")] == [ROUND]


def test_lines_end_where_json_says_so(tmp_path):
    """U+2028 and U+0085 end lines for str.splitlines, and stand in texts from the web."""
    odd = "一\u2028二\x85三"
    found = read(tmp_path, by_line({"text": odd}, {"text": "四"}).replace("\n", "\n\n"), "a.jsonl")
    assert [r.text for r in found] == [odd, "四"]
    (tmp_path / "a.txt").write_text(odd + "\r\n四\n", encoding="utf-8-sig", newline="")
    assert list(lines(tmp_path / "a.txt")) == [odd, "四"]


def test_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"messages": turns(TALK)}]).to_parquet(str(tmp_path / "a.parquet"))
    assert [said(r) for r in records(tmp_path / "a.parquet")] == [TALK]


BAD_TURN = {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no records"),
        ("[]", "holds no records"),
        ("\n \n", "holds no records"),
        ('{"instruction": "a", "output": "b"}', "holds a dict, expected a list"),
        ('"text"', "holds a str, expected a list"),
        ("[1]", "record 1 is a int; expected instruction and output"),
        ("[{}]", "record 1 has neither text nor a conversation, but nothing"),
        ('[{"instruction": "a", "output": "b"}, {"instruction": "a"}]', "record 2 has no output, but instruction"),
        ('[{"instruction": "a", "output": null}]', "record 1 has a NoneType for its output; expected text"),
        ('[{"instruction": "a", "input": 3, "output": "b"}]', "record 1 has a int for its input"),
        ('[{"instruction": "a", "output": "b", "history": ["c"]}]', "history that is no list of questions and answers"),
        ('[{"instruction": "a", "output": "b", "history": [["c", 1]]}]', "a int among its questions and answers"),
        ('[{"input": "a", "output": "b"}]', "without instruction"),
        ('[{"input": ["a"], "output": []}]', "as many inputs as outputs"),
        ('[{"question": "a", "answer": "b"}]', "record 1 has neither text nor a conversation, but question, answer"),
        (listed(BAD_TURN), "record 1 has the role 'tool' in turn 2; known are system, user, human, assistant, gpt"),
        (by_line({"text": "a"}, BAD_TURN), "line 2 has the role 'tool' in turn 2"),
        ('[{"messages": []}]', "record 1 is a conversation without turns"),
        ('[{"messages": {}}]', "record 1 has a dict for its turns"),
        ('[{"messages": [{"role": "user", "content": null}]}]', "record 1 has no text in turn 1"),
        ('[{"messages": [{"content": "a"}]}]', "record 1 has no role in turn 1"),
        ('[[{"role": "user", "text": "a"}, 1]]', "record 1 has no role in turn 2"),
        ('[{"text": "好\\ud83d"}]', "record 1 has half a character, \\ud83d, behind '好'"),
        (r'[{"messages": [{"role": "user", "content": "\ude00"}]}]', "record 1 has half a character"),
        ('[{"text": "a"}', "is no JSON"),
        ('{"text": "a"}\n{"text": ', "line 2 is no JSON"),
        (listed({"text": "量化"}).encode("gbk"), "is GBK, not UTF-8. Convert it: iconv -f GB18030 -t UTF-8 "),
        (listed({"text": "量化"}).encode("utf-16"), "is UTF-16, not UTF-8. Convert it: iconv -f UTF-16 -t UTF-8 "),
        (b"[\xff\xff]", "is no UTF-8 text: byte 1 is 0xff"),
    ],
)
def test_what_is_refused_and_where(tmp_path, content, words):
    with pytest.raises(CorpusError) as error:
        read(tmp_path, content)
    assert str(error.value).startswith(str(tmp_path / "a.json"))
    assert words in str(error.value)


def test_wrong_encoding_is_found_behind_the_first_piece_of_a_large_file(tmp_path):
    path = tmp_path / "a.txt"
    for encoding, words in (("gbk", "GBK"), ("utf-8", f"byte {(1 << 20) + 2}")):
        path.write_bytes(b"a" * ((1 << 20) - 1) + "中".encode(encoding) + (b"" if encoding == "gbk" else b"\xff\xff"))
        for reader in (text, lambda path: list(lines(path))):
            with pytest.raises(CorpusError, match=words):
                reader(path)


def test_folders(tmp_path):
    for name in ("b.json", "a.jsonl", "c.txt", "deep/d.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.name for p in files([tmp_path, tmp_path / "c.txt"], SUFFIXES)] == ["a.jsonl", "b.json", "c.txt"]
    for paths, words in (
        ([tmp_path / "none"], "does not exist"),
        ([tmp_path / "deep"], "holds d.json. Expected files that end in .csv"),
        ([], "no files are named"),
    ):
        with pytest.raises(CorpusError, match=words):
            files(paths, (".csv",))
