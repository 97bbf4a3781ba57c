"""Text: the default corpus, users' files, shares, and what is refused."""

import json

import numpy as np
import pytest

from cnq.corpus import Source, chunks, peoples_daily, read_source
from cnq.errors import CorpusError


def letters(text: str) -> list[int]:
    """A tokenizer for tests: one token a character."""
    return [ord(c) for c in text]


def source(text: str, name: str = "x", weight: float = 1.0) -> Source:
    return Source(name, "0" * 64, (text,), weight)


def test_the_default_text_is_chinese_without_tags_and_never_shared_between_the_splits():
    calibration, held_out = peoples_daily("calibration"), peoples_daily("held-out")
    assert not set(calibration.documents) & set(held_out.documents)
    assert len(held_out.documents) / len(calibration.documents) == pytest.approx(1 / 4, rel=0.15)
    assert sum(map(len, calibration.documents)) > 1_000_000
    text = "".join(held_out.documents)
    assert "/n " not in text
    assert "/w" not in text
    assert sum("一" <= c <= "鿿" for c in text) > 0.7 * len(text)
    assert peoples_daily("held-out") == held_out


def test_files_of_every_kind(tmp_path):
    (tmp_path / "a.txt").write_text("一段\n文字\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(
        '{"text": "甲"}\n\n[{"role": "user", "text": "问"}, {"role": "assistant", "text": "答"}]\n'
    )
    (tmp_path / "c.json").write_text(json.dumps([{"instruction": "翻译", "input": "hi", "output": "你好"}]))
    (tmp_path / "d.json").write_text(json.dumps([{"messages": [{"role": "user", "content": "好"}]}]))

    def render(messages):
        return "|".join(f"{m['role']}:{m['content']}" for m in messages)

    assert read_source(tmp_path / "a.txt").documents == ("一段\n文字",)
    assert read_source(tmp_path / "b.jsonl", render).documents == ("甲", "user:问|assistant:答")
    assert read_source(tmp_path / "c.json", render).documents == ("user:翻译\nhi|assistant:你好",)
    assert read_source(tmp_path / "d.json", render).documents == ("user:好",)


def test_parquet_is_read_through_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": "一"}, {"text": "二"}]).to_parquet(str(tmp_path / "a.parquet"))
    assert read_source(tmp_path / "a.parquet").documents == ("一", "二")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n", "holds no text"),
        ("a.txt", b"GGUF\0\0\0\1", "zero bytes"),
        ("a.txt", "量化模型".encode("gbk"), "iconv -f GB18030"),
        ("a.txt", b"ab\xff\xff", "byte 2"),
        ("a.json", b"{", "no JSON"),
        ("a.json", b'{"text": "x"}', "expected a list"),
        ("a.json", b"[1, 2]", "record 1"),
        ("a.jsonl", b'{"text": "x"}\n{"foo": 1}', "record 2"),
        ("a.json", b'[{"instruction": "a", "output": "b"}]', "chat template"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        read_source(tmp_path / name)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="cannot be read"):
        read_source(tmp_path / "none.txt")


def test_chunks_are_whole_and_counted():
    made = chunks([source("abcdefghij")], letters, 3, None)
    assert made.tokens.tolist() == [[97, 98, 99], [100, 101, 102], [103, 104, 105]]
    (used,) = made.manifest
    assert (used.tokens, used.chunks, used.characters) == (9, 3, 10)


def test_sources_get_their_share_and_take_turns():
    sources = [source("z" * 1000, "zh", 65), source("e" * 1000, "en", 25), source("c" * 1000, "code", 10)]
    made = chunks(sources, letters, 5, 20)
    assert [u.chunks for u in made.manifest] == [13, 5, 2]
    first_half = {chr(t) for t in made.tokens[:10, 0]}
    assert first_half == {"z", "e", "c"}


def test_too_little_text_is_refused():
    with pytest.raises(CorpusError, match="makes 1 chunks of 8 tokens, at least 2"):
        chunks([source("a" * 15)], letters, 8, None)


def test_the_same_text_gives_the_same_chunks():
    one, two = (chunks([peoples_daily("calibration")], letters, 16, 10) for _ in range(2))
    assert np.array_equal(one.tokens, two.tokens)
    assert one.manifest == two.manifest


@pytest.mark.parametrize(
    ("n", "weights", "shares"), [(2, (2, 1, 1), [1, 1, 0]), (100, (2, 1, 1), [50, 25, 25]), (10, (1, 1, 1), [4, 3, 3])]
)
def test_shares_add_up(n, weights, shares):
    sources = [source("字" * 2000, str(i), weight) for i, weight in enumerate(weights)]
    assert [used.chunks for used in chunks(sources, letters, 16, n).manifest] == shares
