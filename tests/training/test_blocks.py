"""Blocks for pre-training: nothing lost, the same as a stream, kept as long as nothing changes, bytes counted."""

import json
import shutil

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import spm
import tiny
from tiny_tokenizers import KINDS, tokenizer

from cnq.errors import CheckpointError, CorpusError
from training import blocks as blocks_file
from training import hf_tokenizer
from training.batches import UNLEARNED
from training.blocks import blocks

SENTENCES = [text for text in tiny.SENTENCES if "\n" not in text]
LINES = [f"第{i}行，{text.strip()}" for i, text in enumerate([*SENTENCES, "  a </s> 龘😀 ", "b<|im_end|>"] * 4)]


@pytest.fixture
def corpus(tmp_path):
    """Two files; with blank lines, and paragraphs of three."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    paragraphs = ["\n".join(LINES[i : i + 3]) for i in range(0, len(LINES), 3)]
    (folder / "b.txt").write_text("\n\n\n".join(paragraphs[7:]) + "\n\n", encoding="utf-8")
    (folder / "a.txt").write_text("\n \n".join(paragraphs[:7]), encoding="utf-8")
    (folder / "notes.md").write_text("not this")
    return folder


def documents_of(kind, rows):
    """The texts between the eos."""
    ids = [id for row in rows for id in row["input_ids"]]
    hf, parts = tokenizer(kind), [[]]
    for id in ids:
        if id == hf.eos_token_id:
            parts.append([])
        else:
            parts[-1].append(id)
    assert parts.pop() == []
    if bos := hf("").input_ids:
        assert all(part[:1] == bos and bos[0] not in part[1:] for part in parts)
    return [spaced(kind, hf.decode(part[len(bos) :], clean_up_tokenization_spaces=False)) for part in parts]


def spaced(kind, text):
    """transformers' LlamaTokenizer writes a space behind an added token, and drops one that a text begins with."""
    return text.replace(" ", "") if kind == "spm-added" else text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("documents", ["line", "paragraph", "file"])
def test_every_document_is_there_once_and_in_order(corpus, tmp_path, kind, documents):
    made = blocks([corpus], tokenizer(kind), block_size=16, cache=tmp_path / "cache", held_out=0, documents=documents)
    a, b = ((corpus / name).read_text(encoding="utf-8") for name in ("a.txt", "b.txt"))
    want = {"line": LINES, "paragraph": [*a.split("\n \n"), *b.strip().split("\n\n\n")], "file": [a, b.removesuffix("\n")]}
    assert documents_of(kind, made.train) == [spaced(kind, text) for text in want[documents]]
    lengths = [len(row["input_ids"]) for row in made.train]
    assert lengths[:-1] == [16] * (len(lengths) - 1)
    assert 1 < lengths[-1] <= 16
    assert (made.counts.blocks, made.counts.tokens) == (len(lengths), sum(lengths))
    assert made.counts.nbytes == sum(len(text.encode()) for text in want[documents])
    assert made.counts.documents == len(want[documents])
    assert made.held_out is None


@pytest.mark.parametrize("kind", ["spm-ours", "qwen2"])
@pytest.mark.parametrize("documents", ["line", "paragraph", "file"])
def test_a_stream_gives_the_same_blocks_and_goes_on_where_it_was(corpus, tmp_path, kind, documents):
    options = {"block_size": 24, "cache": tmp_path / "cache", "held_out": 0.2, "documents": documents}
    whole, stream = (blocks([corpus], tokenizer(kind), streaming=streaming, **options) for streaming in (False, True))
    assert list(stream.train) == list(whole.train)
    assert list(stream.held_out) == list(whole.held_out)
    same = {"tokens": None, "blocks": None}
    assert vars(stream.counts) == vars(whole.counts) | same

    steps = iter(stream.train)
    before = [next(steps) for _ in range(3)]
    state = stream.train.state_dict()
    again = blocks([corpus], tokenizer(kind), streaming=True, **options).train
    again.load_state_dict(state)
    assert before + list(again) == list(whole.train)


def test_a_stream_reads_no_further_than_it_has_to(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("training.encoding._BATCH", 100)
    made = blocks([corpus], tokenizer("spm-added"), block_size=16, cache=tmp_path / "cache", held_out=0, streaming=True)
    (corpus / "b.txt").unlink()
    steps = iter(made.train)
    assert len(next(steps)["input_ids"]) == 16
    with pytest.raises(CorpusError, match=r"b\.txt cannot be read"):
        list(steps)


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_documents_are_no_training_documents_and_their_bytes_are_exact(corpus, tmp_path, kind):
    made = blocks([corpus], tokenizer(kind), block_size=1 << 20, cache=tmp_path / "cache", held_out=0.3, seed=3)
    (row,) = made.held_out
    kept, trained = documents_of(kind, [row]), documents_of(kind, made.train)
    assert sorted(kept + trained) == sorted(spaced(kind, text) for text in LINES)
    assert not set(kept) & set(trained)
    assert 2 < len(kept) < 20
    assert (made.counts.documents, made.counts.held_out_documents) == (len(trained), len(kept))
    hf = tokenizer(kind)
    special = {hf.eos_token_id, *hf("").input_ids}
    assert row["labels"] == [UNLEARNED] + [UNLEARNED if id in special else id for id in row["input_ids"][1:]]
    sizes = {spaced(kind, text): len(text.encode()) for text in LINES}
    unseen = 0 if hf("").input_ids else len(kept[0][0].encode())  # of the first token, which nothing predicts
    if kind == "qwen2":
        assert row["input_ids"][0] != hf.convert_tokens_to_ids(kept[0][0])  # part of a character, which counts where it begins
    assert row["bytes"] == made.counts.held_out_bytes == sum(sizes[text] for text in kept) - unseen
    assert made.counts.held_out_tokens == sum(label != UNLEARNED for label in row["labels"])


@pytest.mark.parametrize("kind", ["spm-ours", "llama-bpe"])
def test_bytes_of_all_blocks_are_those_of_the_text_but_for_each_first_token(corpus, tmp_path, kind):
    made = blocks([corpus], tokenizer(kind), block_size=8, cache=tmp_path / "cache", held_out=0.5)
    kept = documents_of(kind, made.held_out)
    total = sum(len(text.encode()) for text in kept)
    assert sum(made.held_out["bytes"]) == made.counts.held_out_bytes < total
    assert made.counts.held_out_bytes > total * 0.75
    assert all(any(label != UNLEARNED for label in labels[1:]) for labels in made.held_out["labels"])


def test_the_seed_decides_what_is_held_out_and_the_order_does_not(corpus, tmp_path):
    def kept(seed, paths=(corpus,)):
        options = {"block_size": 64, "cache": tmp_path / "cache", "held_out": 0.2, "seed": seed}
        return sorted(documents_of("llama-bpe", blocks(paths, tokenizer("llama-bpe"), **options).held_out))

    assert kept(1) == kept(1, [corpus / "b.txt", corpus / "a.txt"]) != kept(2)


def test_of_few_documents_one_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("甲乙\n丙丁\n甲乙\n戊己\n", encoding="utf-8")
    made = blocks([tmp_path], tokenizer("spm-added"), block_size=64, cache=tmp_path / "cache", held_out=1e-9)
    kept, trained = (documents_of("spm-added", rows) for rows in (made.held_out, made.train))
    assert len(set(kept)) == 1
    assert sorted(kept + trained) == sorted(["甲乙", "丙丁", "甲乙", "戊己"])


@pytest.fixture
def work(monkeypatch):
    """How often text was tokenised."""
    done = []
    monkeypatch.setattr(blocks_file, "survey", lambda *args, made=blocks_file.survey: done.append(1) or made(*args))
    return done


def test_what_was_tokenised_is_used_again_until_something_changes(corpus, tmp_path, work):
    hf, cache = tokenizer("spm-ours"), tmp_path / "cache"

    def run(**changed):
        options = {"block_size": 16, "cache": cache, "tokenizer": hf, **changed}
        made = blocks([corpus], options.pop("tokenizer"), **options)
        return len(work), list(made.train), made.counts

    first = run()
    assert first[0] == 1
    hf("a b c", truncation=True, max_length=4)  # which the tokenizer remembers
    assert run() == first
    shutil.move(corpus, tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "elsewhere", corpus)
    assert run() == first

    n = 1
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    other = spm.llama(folder)
    other.pieces[300].piece = "量化模型"
    hf_tokenizer.write(other, folder)
    from transformers import AutoTokenizer

    for changed in ({"block_size": 17}, {"tokenizer": AutoTokenizer.from_pretrained(folder)}, {"seed": 5}, {"held_out": 0.5},
                    {"documents": "paragraph"}, {"streaming": True}):  # fmt: skip
        n += 1
        assert run(**changed)[0] == n
        assert run(**changed)[0] == n
    with (corpus / "a.txt").open("a", encoding="utf-8") as file:
        file.write("\n又一行")
    again = run()
    assert again[0] == n + 1
    assert again[1] != first[1]


def test_what_was_not_finished_is_made_again(corpus, tmp_path, monkeypatch):
    def dies(*_):
        raise KeyboardInterrupt

    options = {"block_size": 16, "cache": tmp_path / "cache"}
    with monkeypatch.context() as broken:
        broken.setattr(blocks_file, "_write_held_out", dies)
        with pytest.raises(KeyboardInterrupt):
            blocks([corpus], tokenizer("spm-added"), **options)
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    made = blocks([corpus], tokenizer("spm-added"), **options)
    (counts,) = (tmp_path / "cache").rglob("counts.json")
    assert json.loads(counts.read_text())["counts"] == vars(made.counts)


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (b"", {}, "there is no text"),
        (b" \n\n \n", {"documents": "paragraph"}, "there is no text"),
        ("一行\n".encode("gbk"), {}, r"a\.txt is GBK, not UTF-8\. Convert it: iconv -f GB18030"),
        ("只有一行".encode(), {}, "of 1 documents all would be held out"),
        (b"one\ntwo", {"documents": "file"}, "all would be held out"),
        (b"a\nb", {"block_size": 1}, "block_size is 1"),
        (b"a\nb", {"held_out": 1}, "held_out 1"),
    ],
)
def test_what_is_refused(tmp_path, content, options, words):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(CorpusError, match=words):
        blocks([tmp_path], tokenizer("spm-added"), **{"block_size": 16, "cache": tmp_path / "cache", **options})
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_a_folder_without_text_files_says_what_is_there(tmp_path):
    (tmp_path / "a.json").touch()
    with pytest.raises(CorpusError, match=r"holds a\.json\. Expected files that end in \.txt"):
        blocks([tmp_path], tokenizer("spm-added"), block_size=16, cache=tmp_path / "cache")


def test_a_tokenizer_without_eos_or_without_offsets_is_refused(corpus, tmp_path):
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer("qwen2").backend_tokenizer)
    with pytest.raises(CheckpointError, match="has no eos_token"):
        blocks([corpus], bare, block_size=16, cache=tmp_path / "cache")
    slow = type("Slow", (), {"is_fast": False, "name_or_path": "old/"})()
    with pytest.raises(CheckpointError, match="old/: its tokenizer is a slow one"):
        blocks([corpus], slow, block_size=16, cache=tmp_path / "cache")


def test_progress_and_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks_file, "_REPORTED", 2)
    (tmp_path / "a.txt").write_bytes("\ufeff一\r\n二\r\n\r\n三\r\n".encode())
    seen = []
    for kind, want in (("line", ["一", "二", "三"]), ("paragraph", ["一\n二", "三"]), ("file", ["一\n二\n\n三"])):
        made = blocks(
            [tmp_path], tokenizer("qwen2"), block_size=99, cache=tmp_path / "cache", held_out=0, documents=kind,
            progress=lambda *at: seen.append(at),
        )  # fmt: skip
        assert documents_of("qwen2", made.train) == want
    assert seen == [(0, 3), (2, 3), (3, 3), (0, 2), (2, 2), (0, 1), (1, 1)]
