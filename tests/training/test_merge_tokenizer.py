"""LLaMA's vocabulary and Chinese ones made one: ids, scores, files, three tokenizers that cut alike, and what is refused."""

import json
import shutil

import pytest
import spm
import tiny
from click.testing import CliRunner
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from cnq import vocab
from cnq.checkpoint import open_checkpoint
from cnq.errors import UnsupportedVocab
from cnq.vocab.vocab import Kind
from training.hf_tokenizer import cut_otherwise
from training.merge_tokenizer import command, merge_tokenizer
from training.pieces import appended, missing_characters, new_characters, read_base, read_model
from training.reachability import unproduced
from training.vocabulary import merge

pytest.importorskip("transformers")

CHINESE = [
    "的",
    "我们",
    "量化",
    "模型",
    "越",
    "来",
    "多",
    "越来越",
    "越来越多",
    "a的",
    "，",
    "。",
    "▁我们",
    "大模",
    "大模型",
    "rown",
    "天空",
    "蓝",
]
LINES = [
    *tiny.SENTENCES,
    "越来越多的大模型，我们量化。天空很蓝",
    "  two spaces   and 我们  的 a的",
    "quick brown 我们brown\tfox 😀𠀀 １２",
    "x <s> </s> [PAD] <|im_start|>",
]


@pytest.fixture
def llama(tmp_path):
    """(directory with the tokenizer of the tiny model, the model)."""
    (tmp_path / "llama").mkdir()
    return tmp_path / "llama", spm.llama(tmp_path / "llama")


def run(*args):
    return CliRunner().invoke(command, [str(a) for a in args])


def seeds_merge(base: ModelProto, source: ModelProto) -> ModelProto:
    """What Chinese-LLaMA-Alpaca's scripts do, in their words: a piece of score 0 for each that is not there."""
    merged = ModelProto()
    merged.CopyFrom(base)
    there = {p.piece for p in base.pieces}
    for p in source.pieces:
        if p.piece not in there:
            merged.pieces.add(piece=p.piece, score=0)
    return merged


# The pieces


def test_with_score_zero_it_is_the_seeds_model_to_the_byte(llama, tmp_path):
    folder, base = llama
    source = spm.chinese(CHINESE)
    merge_tokenizer(folder, [spm.saved(source, tmp_path / "zh.model")], tmp_path / "out", scores="zero", texts=[text(tmp_path)])
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == seeds_merge(base, source).SerializeToString()


def test_ids_are_the_seeds_whatever_the_scores(llama):
    _, base = llama
    want = spm.texts(seeds_merge(base, spm.chinese(CHINESE)))
    for scores in ("after", "zero"):
        model, account = merge(base, [spm.chinese(CHINESE)], scores=scores)
        assert spm.texts(model) == want
        assert account.new == len(want) - len(base.pieces)


def test_scores_after_tie_with_nothing_and_leave_the_base_s_text_alone(llama):
    _, base = llama
    model, _ = merge(base, [spm.chinese(CHINESE)])
    scores = [p.score for p in model.pieces[len(base.pieces) :]]
    lowest = min(p.score for p in base.pieces if p.type == Kind.NORMAL)
    assert scores == [lowest - i for i in range(1, len(scores) + 1)]
    for line in ("The quick brown fox jumps", "语言本身。北京的秋天"):
        assert spm.encoder(model).encode(line, out_type=str) == spm.encoder(base).encode(line, out_type=str)


def test_scores_after_stay_apart_where_float32_is_coarse():
    base = spm.bpe({"ab": -3e9, "a": -3e9, "b": -3e9})
    model = appended(base, [chr(0x4E00 + i) for i in range(20000)])
    scores = [p.score for p in model.pieces[len(base.pieces) :]]
    assert all(b < a for a, b in zip([-3e9, *scores], scores, strict=False))


def test_new_pieces_can_take_the_place_of_old_ones_with_score_zero_only():
    base = spm.bpe({"ab": -1.0, "cd": -2.0, "abcd": -3.0, **dict.fromkeys("abcd▁", -9.0)})
    source = spm.chinese(["bc", "中"])
    assert merge(base, [source], scores="zero")[1].lost == ("abcd",)
    assert merge(base, [source])[1].lost == ()
    restored, account = merge(base, [source], scores="zero", unreachable="add")
    assert account.lost == () and unproduced(restored) == []


def test_control_unknown_and_byte_pieces_of_a_source_are_left_out(llama):
    _, base = llama
    source = spm.chinese(["犇", "<b>"])
    source.pieces[-1].type = Kind.CONTROL
    source.pieces.add(piece="麤", score=0.0, type=Kind.USER_DEFINED)
    source.pieces.add(piece="<0x41>", score=0.0, type=Kind.BYTE)
    model, _ = merge(base, [source])
    assert [(p.piece, p.type) for p in model.pieces[len(base.pieces) :]] == [("犇", Kind.NORMAL), ("麤", Kind.NORMAL)]


def test_characters_are_every_ideograph_that_is_missing(llama):
    _, base = llama
    here = {t for t in spm.texts(base) if len(t) == 1 and "\u4e00" <= t <= "\u9fff"}
    assert len(here) > 50
    model, account = merge(base, [], characters=True)
    added = spm.texts(model)[len(base.pieces) :]
    assert added == sorted(added) and len(added) == account.new == 20992 - len(here)
    assert new_characters(set(spm.texts(model))) == []


# Dead pieces


def test_dead_pieces_are_kept_added_for_or_dropped(llama):
    _, base = llama
    source = spm.chinese(CHINESE)
    kept, account = merge(base, [source])
    assert set(account.unproduced) >= {"越来越", "越来越多"}
    assert account.without_split == len(account.unproduced)

    grown, added = merge(base, [source], unreachable="add")
    assert spm.texts(grown)[: len(kept.pieces)] == spm.texts(kept)
    assert added.added and not added.unproduced and not unproduced(grown)

    smaller, dropped = merge(base, [source], unreachable="drop")
    assert dropped.dropped == account.unproduced and not dropped.unproduced
    assert spm.texts(smaller) == [t for t in spm.texts(kept) if t not in dropped.dropped]
    for line in LINES:
        cuts = [spm.encoder(m).encode(line, out_type=str) for m in (kept, smaller, grown)]
        assert cuts[0] == cuts[1], line
        assert len(cuts[2]) <= len(cuts[0])


def test_what_the_base_never_produced_is_left_alone():
    base = spm.bpe({"abc": -1.0, **dict.fromkeys("abc▁", -9.0)})
    for choice in ("keep", "add", "drop"):
        model, account = merge(base, [spm.chinese(["中", "文"])], unreachable=choice)
        assert (account.added, account.dropped, account.lost) == ((), (), ())
        assert unproduced(model) == ["abc"]


def test_add_also_adds_characters_of_which_pieces_are_made(llama):
    """transformers makes bytes of a character that is no piece, before it joins anything; SentencePiece joins it."""
    _, base = llama
    model, account = merge(base, [spm.chinese(["犇麤"])])
    assert missing_characters(model) == ["犇", "麤"] and not account.unproduced
    assert cut_otherwise(model, ["犇麤"]) == 1
    model, account = merge(base, [spm.chinese(["犇麤"])], unreachable="add")
    assert account.added == ("犇", "麤") and not missing_characters(model)
    assert cut_otherwise(model, ["犇麤"]) == 0


# Special tokens


def test_special_tokens_are_control_pieces_and_pad_is_the_last(llama, tmp_path):
    folder, _ = llama
    out = tmp_path / "out"
    zh = spm.saved(spm.chinese(CHINESE), tmp_path / "zh.model")
    found = merge_tokenizer(folder, [zh], out, special_tokens=["<|im_start|>"], pad_token="[PAD]", texts=[text(tmp_path)])
    model = read_model(out / "tokenizer.model")
    assert [(p.piece, p.type) for p in model.pieces[-2:]] == [("<|im_start|>", Kind.CONTROL), ("[PAD]", Kind.CONTROL)]
    assert found.special == 2 and found.tokens == len(model.pieces) == found.base + found.pieces.new + 2
    assert spm.encoder(model).pad_id() == found.tokens - 1
    cnq = vocab.load(out, found.tokens)
    assert cnq.special["pad"] == found.tokens - 1 and cnq.kinds[-2:] == [Kind.CONTROL] * 2


@pytest.mark.parametrize("token", ["", "的", "<s>", "大大", "〇"])
def test_a_special_token_that_text_turns_into_is_refused(llama, token):
    """llama.cpp joins two neighbours to a control piece, too."""
    _, base = llama
    with pytest.raises(UnsupportedVocab, match="special token"):
        merge(base, [spm.chinese(["的", "大", "越"])], controls=[token])


# The files


def text(folder):
    path = folder / "text.txt"
    path.write_text("\n".join(LINES), encoding="utf-8")
    return path


@pytest.fixture
def merged(llama, tmp_path):
    """(result, directory) of a merge with everything in it."""
    folder, _ = llama
    zh = spm.saved(spm.chinese(CHINESE), tmp_path / "zh.model")
    out = tmp_path / "out"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": tiny.CHATML, "add_eos_token": True}))
    return merge_tokenizer(folder, [zh], out, unreachable="add", pad_token="[PAD]", texts=[text(tmp_path)]), out


def test_transformers_cuts_as_sentencepiece_does(merged):
    import transformers

    result, out = merged
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    exact = spm.encoder(read_model(out / "tokenizer.model"))
    assert result.cut_otherwise == 0
    for line in LINES[:-1]:  # the last has special tokens in it
        assert tokenizer.encode(line, add_special_tokens=False) == exact.encode(line), line
        assert tokenizer.decode(exact.encode(line)) == exact.decode(exact.encode(line))
    assert tokenizer.encode("我们") == [1, *exact.encode("我们"), 2]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (result.tokens - 1, 1, 2)
    assert tokenizer.encode("[PAD]", add_special_tokens=False) == [result.tokens - 1]
    assert len(tokenizer) == result.tokens
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "好"}], tokenize=False) == "<|im_start|>user\n好<|im_end|>\n"
    )
    by_name = transformers.LlamaTokenizer.from_pretrained(out)
    for line in LINES[:-1]:
        if not line.startswith(" "):  # transformers' own class puts no space before one
            assert by_name.encode(line, add_special_tokens=False) == exact.encode(line), line


def test_the_lines_that_transformers_cuts_otherwise_are_counted(llama, tmp_path):
    """Of equal scores SentencePiece joins the leftmost; tokenizers has no equals."""
    folder, _ = llama
    zh = spm.saved(spm.chinese(["犇", "麤", "猋", "犇麤", "麤犇", "猋犇"]), tmp_path / "zh.model")
    path = tmp_path / "race.txt"
    path.write_text("犇麤犇\n麤犇麤\n我们\n", encoding="utf-8")
    result = merge_tokenizer(folder, [zh], tmp_path / "zero", scores="zero", texts=[path])
    assert (result.cut_otherwise, result.lines) == (1, 3)
    assert any("1 of 3 lines" in note for note in result.notes)
    assert merge_tokenizer(folder, [zh], tmp_path / "after", texts=[path]).cut_otherwise == 0


@pytest.mark.parametrize("scores", ["after", "zero"])
def test_llama_cpp_cuts_as_sentencepiece_does(scores, tmp_path):
    from cnq.convert import convert
    from cnq.engine.model import Model

    base = tiny.checkpoint(tmp_path / "base", vocab="spm")
    zh = spm.saved(spm.chinese(CHINESE), tmp_path / "zh.model")
    out = tmp_path / "out"
    found = merge_tokenizer(
        base, [zh], out, model=base, scores=scores, unreachable="add", pad_token="[PAD]",
        special_tokens=["<|im_start|>"], pad_to_multiple_of=8, texts=[text(tmp_path)],
    )  # fmt: skip
    exact = spm.encoder(read_model(out / "tokenizer.model"))
    with Model(convert(out, tmp_path / "m.gguf").path, n_ctx=64) as model:
        for line in LINES:
            assert model.tokenize(line, add_special=False, parse_special=False) == exact.encode(line), line
        assert model.tokenize("[PAD]", add_special=False, parse_special=True) == [found.tokens - 1]
        assert model.tokenize("<|im_start|>", add_special=False, parse_special=True) == [found.tokens - 2]


# Bytes per token


def test_bytes_per_token_are_counted_apart(merged):
    """English: the lines with more than four Latin letters to a Chinese character."""
    result, out = merged
    found = {e.language: e for e in result.efficiency}
    assert set(found) == {"Chinese", "English"}
    assert sum(e.nbytes for e in found.values()) == len("\n".join(LINES).encode())
    passages = ["".join(f"{line}\n" for line in LINES[3:6]), "\n".join(LINES[-2:])]
    assert LINES[5].startswith("def") and found["English"].nbytes == sum(len(p.encode()) for p in passages)
    exact = spm.encoder(read_model(out / "tokenizer.model"))
    assert found["English"].after.tokens == sum(len(exact.encode(p)) for p in passages)
    for e in found.values():
        assert e.after.bytes_per_token == pytest.approx(e.nbytes / e.after.tokens, abs=1e-4)
        assert e.before.tokens_per_character == pytest.approx(e.before.tokens / e.characters, abs=1e-4)
    assert found["Chinese"].after.tokens < found["Chinese"].before.tokens


def test_the_default_text_is_chinese_and_english(llama, tmp_path):
    folder, _ = llama
    zh = spm.saved(spm.chinese(CHINESE), tmp_path / "zh.model")
    result = merge_tokenizer(folder, [zh], tmp_path / "out")
    assert [e.language for e in result.efficiency] == ["Chinese", "English"]
    assert all(e.nbytes > 100_000 for e in result.efficiency)


# A Chinese model of one's own


def test_a_model_is_trained_merged_and_kept(llama, tmp_path):
    folder, base = llama
    path = text(tmp_path)
    made = []
    for name in ("one", "two"):
        result = run(folder, tmp_path / name, "--train-from", path, "--vocab-size", 160, "--text", path, "--json")
        assert result.exit_code == 0, result.output
        made.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
    assert made[0] == made[1]
    trained = read_model(tmp_path / "one" / "chinese_sp.model")
    merged = read_model(tmp_path / "one" / "tokenizer.model")
    assert len(trained.pieces) == 160 and trained.normalizer_spec.name == "identity"
    assert set(spm.texts(trained)) <= set(spm.texts(merged))
    found = json.loads(result.stdout)
    assert found["pieces"]["new"] == len(merged.pieces) - len(base.pieces) > 0
    assert found["pieces"]["unproduced"] == []  # BPE's pieces are made of each other


def test_too_little_text_to_train_on_is_said(llama, tmp_path):
    folder, _ = llama
    refused(run(folder, tmp_path / "out", "--train-from", text(tmp_path)), "20000 pieces", "--vocab-size")
    assert not (tmp_path / "out").exists()


# The command, and what it refuses


def refused(result, *saying):
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    message = result.stderr.splitlines()[-1]
    assert message.startswith("Error: ")
    assert all(word in message for word in saying), message


def test_the_command_shows_what_was_made(llama, tmp_path):
    folder, base = llama
    zh = spm.saved(spm.chinese(CHINESE), tmp_path / "zh.model")
    shown = run(folder / "tokenizer.model", zh, tmp_path / "out", "--text", text(tmp_path))
    assert shown.exit_code == 0, shown.output
    assert f"{len(base.pieces)} + " in shown.stdout and "bytes/token" in shown.stdout
    assert "越来越" in shown.stderr and "--unreachable add" in shown.stderr
    again = run(folder / "tokenizer.model", zh, tmp_path / "out", "--text", text(tmp_path))
    refused(again, "exists", "--force")
    result = run(folder, zh, tmp_path / "out", "--text", text(tmp_path), "--json", "--force", "--unreachable", "drop")
    found = json.loads(result.stdout)
    assert found["tokens"] == len(read_base(tmp_path / "out").pieces) == found["base"] + found["pieces"]["new"]
    assert found["rows"] is None and found["pieces"]["dropped"]


def test_bad_tokenizers_are_refused_by_name(llama, tmp_path):
    import base64

    folder, _ = llama
    zh, out = spm.saved(spm.chinese(CHINESE), tmp_path / "zh.model"), tmp_path / "out"
    ranks, junk = tmp_path / "ranks.model", tmp_path / "junk.model"
    ranks.write_bytes(b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256)))
    junk.write_bytes(b"\x89PNG no protobuf at all")
    refused(run(ranks, zh, out), "tiktoken", "LLaMA 3", "95 %")
    refused(run(folder, ranks, out), "tiktoken")
    refused(run(junk, zh, out), "no SentencePiece file")
    refused(run(folder, tmp_path / "none.model", out), "cannot be read")
    refused(run(zh, folder / "tokenizer.model", out), "UNIGRAM", "expected BPE", "first")
    refused(run(folder, folder / "tokenizer.model", out), "nothing to add")
    refused(run(tmp_path, zh, out), "has no tokenizer.model")
    refused(run(spm.saved(ModelProto(), tmp_path / "empty.model"), zh, out), "no SentencePiece file")
    twice = spm.bpe(["ab"])
    twice.pieces.add(piece="ab", score=0.0)
    refused(run(spm.saved(twice, tmp_path / "twice.model"), zh, out), "no SentencePiece file")
    normalizing = spm.bpe(["ab", "a", "b"])
    normalizing.normalizer_spec.remove_extra_whitespaces = True
    refused(run(spm.saved(normalizing, tmp_path / "n.model"), zh, out), "normalizes")
    assert not out.exists()


def test_tokenizers_without_tokenizer_model_are_refused_by_kind(tmp_path):
    zh, out = spm.saved(spm.chinese(CHINESE), tmp_path / "zh.model"), tmp_path / "out"
    for kind, saying in (("llama-bpe", "byte-level"), ("spm-json", "lacks the tokenizer.model")):
        (tmp_path / kind).mkdir()
        tiny.tokenizer(tmp_path / kind, kind)
        refused(run(tmp_path / kind, zh, out), saying)


def test_tokens_added_beside_the_model_are_refused(tmp_path):
    """Their ids are those that the new pieces would get."""
    (tmp_path / "added").mkdir()
    tiny.tokenizer(tmp_path / "added", "spm-added")
    refused(
        run(tmp_path / "added", spm.saved(spm.chinese(CHINESE), tmp_path / "zh.model"), tmp_path / "out"), "<|im_start|>", "420"
    )


@pytest.mark.parametrize("content", ["[]", "{", '{"added_tokens_decoder": {"x": {}}}', '{"added_tokens_decoder": [1]}'])
def test_a_malformed_tokenizer_config_is_refused(llama, tmp_path, content):
    folder, _ = llama
    (folder / "tokenizer_config.json").write_text(content)
    refused(run(folder, spm.saved(spm.chinese(CHINESE), tmp_path / "zh.model"), tmp_path / "out"), str(folder))


def test_force_replaces_a_tokenizer_and_nothing_else(llama, tmp_path):
    folder, _ = llama
    zh = spm.saved(spm.chinese(CHINESE), tmp_path / "zh.model")
    out, path = tmp_path / "out", text(tmp_path)
    merge_tokenizer(folder, [zh], out, texts=[path])
    (out / "model.safetensors").write_bytes(b"weights")
    refused(run(folder, zh, out, "--text", path, "--force"), "model.safetensors")
    assert (out / "model.safetensors").exists()
    refused(run(folder, zh, folder, "--text", path, "--force"), "other things")
    assert read_base(folder)
    (out / "model.safetensors").unlink()
    assert run(folder, zh, out, "--text", path, "--force").exit_code == 0


def test_options_without_what_they_are_about_are_refused(llama, tmp_path):
    folder, _ = llama
    zh = spm.saved(spm.chinese(CHINESE), tmp_path / "zh.model")
    for option in (("--pad-to-multiple-of", 64), ("--new-rows", "mean"), ("--vocab-size", 100)):
        result = run(folder, zh, tmp_path / "out", *option)
        assert result.exit_code == 2 and option[0] in result.stderr


def test_a_model_of_another_vocabulary_is_refused(tmp_path):
    base = tiny.checkpoint(tmp_path / "base", vocab="spm")
    zh = spm.saved(spm.chinese(CHINESE), tmp_path / "zh.model")
    path, out = text(tmp_path), tmp_path / "out"
    longer = spm.saved(appended(read_base(base), ["犇"]), tmp_path / "longer" / "tokenizer.model")
    refused(run(longer, zh, out, "--text", path, "--model", base), "420 rows", "421 pieces")
    other = read_base(base)
    other.pieces[-1].piece = "犇"
    refused(run(spm.saved(other, tmp_path / "o.model"), zh, out, "--text", path, "--model", base), "another tokenizer.model")
    for multiple in (9, 256):
        refused(run(base, zh, out, "--text", path, "--model", base, "--pad-to-multiple-of", multiple), "multiple of 8")
    shutil.rmtree(base)
    refused(run(longer, zh, out, "--text", path, "--model", base), str(base))
    assert not out.exists()


def test_an_extended_model_is_one_that_cnq_opens(tmp_path):
    base = tiny.checkpoint(tmp_path / "base", vocab="spm")
    zh = spm.saved(spm.chinese(CHINESE), tmp_path / "zh.model")
    shown = run(base, zh, tmp_path / "out", "--text", text(tmp_path), "--model", base, "--pad-token", "[PAD]",
                "--pad-to-multiple-of", 8, "--max-shard-size", "50KB", "--json")  # fmt: skip
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.config["vocab_size"] == found["rows"] and found["rows"] % 8 == 0
    assert checkpoint.config["pad_token_id"] == found["tokens"] - 1
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
