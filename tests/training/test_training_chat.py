"""training.chat: the prompt of cnq chat token by token, greedy answers, adapters merged or not, batches of instructions."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from cnq.chat import prompt_tokens, style_of  # noqa: E402
from cnq.engine.model import Model, Sampling  # noqa: E402
from cnq.errors import CheckpointError, CorpusError, EngineError, OutputExists, PromptError, VocabMismatch  # noqa: E402
from cnq.prompts import FORMATS  # noqa: E402
from training import engine as engines  # noqa: E402
from training.chat import converse, main, predict  # noqa: E402
from training.engine import LlamaEngine, _texts  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT and transformers have much to say of what is tested here

# A token of its own with a space after it is not among them: there transformers writes one ▁, llama.cpp two.
CONVERSATIONS = [
    [{"role": "user", "content": "你好"}],
    [{"role": "system", "content": "你是一个助手。"}, {"role": "user", "content": "Hello, 世界！\n"}],
    [{"role": "user", "content": "  一 "}, {"role": "assistant", "content": "二。"}, {"role": "user", "content": "😀<s>量。"}],
    [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
     {"role": "user", "content": "c\n\n"}],
]  # fmt: skip
GREEDY = {"temperature": 0, "repeat_penalty": 1}


@pytest.fixture(scope="module")
def checkpoint(gguf) -> Path:
    """With a chat template of its own."""
    return gguf(vocab="spm-added", dtype="f32").with_name("hf")


@pytest.fixture(scope="module")
def engine(checkpoint) -> LlamaEngine:
    return LlamaEngine(checkpoint, device="cpu")


@pytest.mark.parametrize("format", [None, *FORMATS])
@pytest.mark.parametrize("vocab", ["spm", "spm-added", "spm-json", "llama-bpe", "qwen2"])
def test_the_prompt_is_that_of_cnq_chat_token_by_token(gguf, vocab, format):
    path = gguf(vocab=vocab)
    if format is None and vocab in ("spm", "spm-json"):
        pytest.skip("has no chat template")
    engine = LlamaEngine(path.with_name("hf"), format=format, device="cpu")
    with Model(path, n_ctx=256) as model:
        style = style_of(model.fields, path, format)
        assert style == engine.style
        for messages in CONVERSATIONS:
            assert engine.prompt_tokens(messages) == prompt_tokens(model, style, messages)


def test_a_text_is_gone_on_with_as_it_is(engine, checkpoint):
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    assert engine.prompt_tokens("白日依山尽") == tokenizer("白日依山尽").input_ids


def greedy(model: Any, prompt: list[int], n: int) -> list[int]:
    """The likeliest token each time, the whole text computed anew."""
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_answers_at_temperature_0_are_greedy(engine, checkpoint):
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    prompt = engine.prompt_tokens(CONVERSATIONS[0])
    expected = greedy(model, prompt, 12)
    assert list(engine._tokens(prompt, Sampling(**GREEDY), 12)) == expected
    text = engine.tokenizer.decode([*prompt, *expected])[len(engine.tokenizer.decode(prompt)) :]
    assert engine.generate(CONVERSATIONS[0], max_new_tokens=12, **GREEDY) == text.strip()


@pytest.mark.parametrize(
    "penalties",
    [
        {"repeat_penalty": 1},
        {"repeat_penalty": 1.3, "repeat_last_n": 8},
        {"repeat_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"repeat_penalty": 1.5, "repeat_last_n": 0},
    ],
    ids=str,
)
def test_answers_are_those_of_cnq_chat(engine, gguf, penalties):
    path = gguf(vocab="spm-added", dtype="f32")
    how = Sampling(temperature=0, **penalties)
    with Model(path, n_ctx=256, exact=True) as model:
        for messages in CONVERSATIONS[:2]:
            prompt = engine.prompt_tokens(messages)
            assert list(engine._tokens(prompt, how, 16)) == list(model.generate(prompt, how, 16))


def test_an_answer_ends_where_the_checkpoint_says(engine):
    prompt = engine.prompt_tokens(CONVERSATIONS[0])
    first, second = list(engine._tokens(prompt, Sampling(**GREEDY), 8))[:2]
    assert engine.tokenizer.eos_token_id in engine._ends
    assert engine.tokenizer.convert_tokens_to_ids("<|im_end|>") in engine._ends
    ends, engine._ends = engine._ends, {second}
    try:
        assert list(engine._tokens(prompt, Sampling(**GREEDY), 8)) == [first]
    finally:
        engine._ends = ends


def test_sampling_follows_its_seed_and_its_limits(engine):
    prompt = engine.prompt_tokens(CONVERSATIONS[0])

    def answer(**how):
        return list(engine._tokens(prompt, Sampling(repeat_penalty=1, **how), 12))

    assert answer(temperature=5.0, top_k=0, top_p=1.0, seed=7) == answer(temperature=5.0, top_k=0, top_p=1.0, seed=7)
    assert answer(temperature=5.0, top_k=0, top_p=1.0, seed=7) != answer(temperature=5.0, top_k=0, top_p=1.0, seed=8)
    likeliest = answer(temperature=0)
    assert answer(temperature=5.0, top_k=1, top_p=1.0) == answer(temperature=5.0, top_k=0, top_p=1e-6) == likeliest
    assert answer(temperature=5.0, top_k=0, top_p=1.0, min_p=1.0) == likeliest
    with pytest.raises(EngineError, match="cnq serve"):
        engine.generate(CONVERSATIONS[0], grammar="root ::= [a-z]+")


def test_pieces_are_whole_characters_and_make_the_answer(engine):
    vocab = engine.tokenizer.get_vocab()
    bytes_of = [vocab[f"<0x{byte:02X}>"] for byte in "😀龘".encode()]
    tokens = [*engine.tokenizer("你好 world", add_special_tokens=False).input_ids, *bytes_of]
    pieces = list(_texts(engine.tokenizer, tokens))
    assert "".join(pieces) == engine.tokenizer.decode(tokens)
    assert {"😀", "龘"} <= set(pieces)
    cut = list(_texts(engine.tokenizer, [*tokens, bytes_of[0]]))
    assert cut[:-1] == pieces
    assert "�" in cut[-1]
    streamed = list(engine.stream(CONVERSATIONS[1], max_new_tokens=20, **GREEDY))
    assert "".join(streamed).rstrip() == engine.generate(CONVERSATIONS[1], max_new_tokens=20, **GREEDY)


def test_a_context_that_is_full_ends_the_answer(engine):
    n_ctx = engine.model.config.max_position_embeddings
    assert len(list(engine._tokens([5] * (n_ctx - 3), Sampling(**GREEDY), 50))) <= 3
    with pytest.raises(EngineError, match=f"{n_ctx} tokens, the context {n_ctx}"):
        next(engine._tokens([5] * n_ctx, Sampling(), 1))


def test_without_a_template_the_format_must_be_named(gguf):
    engine = LlamaEngine(gguf(vocab="spm").with_name("hf"), device="cpu")
    assert engine.generate("你好", max_new_tokens=3, **GREEDY) is not None
    with pytest.raises(PromptError, match="--format alpaca"):
        engine.generate(CONVERSATIONS[0])
    with pytest.raises(PromptError, match="unknown prompt format"):
        LlamaEngine(gguf(vocab="spm").with_name("hf"), format="nonsense", device="cpu")


# Adapters


def trained(base: Path, folder: Path, rows: int = 0, **settings: Any) -> Any:
    """An adapter as PEFT saves it, its weights random, and the model it was trained in. rows: that the embedding grew to."""
    torch.manual_seed(len(folder.name))
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
        settings["modules_to_save"] = ["embed_tokens", "lm_head"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], **settings)
    model = peft.get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model.eval()


def longer_tokenizer(base: Path, folder: Path, n: int) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(n)])
    tokenizer.save_pretrained(folder)


def test_an_adapter_merged_or_laid_over_answers_alike(checkpoint, engine, tmp_path):
    with_adapter = trained(checkpoint, tmp_path / "lora")
    prompt = engine.prompt_tokens(CONVERSATIONS[0])
    expected = greedy(with_adapter, prompt, 10)
    assert expected != list(engine._tokens(prompt, Sampling(**GREEDY), 10)), "the adapter was to change the answer"
    laid_over = LlamaEngine(checkpoint, tmp_path / "lora", device="cpu")
    assert list(laid_over._tokens(prompt, Sampling(**GREEDY), 10)) == expected
    with_adapter.merge_and_unload().save_pretrained(tmp_path / "merged")
    for file in checkpoint.glob("token*"):
        shutil.copy(file, tmp_path / "merged")
    merged = LlamaEngine(tmp_path / "merged", device="cpu")
    assert list(merged._tokens(prompt, Sampling(**GREEDY), 10)) == expected


def test_adapters_are_merged_in_their_order(checkpoint, tmp_path):
    """The second one brings a longer vocabulary, as Chinese-Alpaca's does; each was trained on the one before."""
    rows = transformers.AutoConfig.from_pretrained(checkpoint).vocab_size
    trained(checkpoint, tmp_path / "first", rows + 3)
    trained(checkpoint, tmp_path / "the second", rows + 4)
    longer_tokenizer(checkpoint, tmp_path / "first", 3)
    longer_tokenizer(checkpoint, tmp_path / "the second", 4)
    engine = LlamaEngine(checkpoint, [tmp_path / "first", tmp_path / "the second"], device="cpu")
    assert len(engine.tokenizer) == engine.model.get_input_embeddings().weight.shape[0] == rows + 4
    assert engine.prompt_tokens("<extra3>")[-1] == rows + 3

    expected = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for name, n in (("first", 3), ("the second", 4)):
        expected.resize_token_embeddings(rows + n, mean_resizing=False)
        expected = peft.PeftModel.from_pretrained(expected, tmp_path / name).merge_and_unload()
    prompt = engine.prompt_tokens(CONVERSATIONS[0])
    with torch.no_grad():
        logits = [model(torch.tensor([prompt])).logits for model in (engine.model, expected)]
    torch.testing.assert_close(*logits, rtol=0, atol=0)
    other_way = LlamaEngine(checkpoint, [tmp_path / "the second", tmp_path / "first"], device="cpu",
                            tokenizer=tmp_path / "first")  # fmt: skip
    assert other_way.model.get_input_embeddings().weight.shape[0] == rows + 3


def test_a_tokenizer_longer_than_the_embeddings_is_refused_by_name(checkpoint, tmp_path):
    longer_tokenizer(checkpoint, tmp_path / "longer", 5)
    rows = transformers.AutoConfig.from_pretrained(checkpoint).vocab_size
    with pytest.raises(VocabMismatch, match=rf"longer has {rows + 5} tokens, the embeddings of .*hf {rows} rows"):
        LlamaEngine(checkpoint, tokenizer=tmp_path / "longer", device="cpu")


def test_an_adapter_of_another_model_is_refused_by_name(checkpoint, gguf, tmp_path):
    other = gguf(vocab="spm-added", dtype="f32", hidden_size=128).with_name("hf")
    trained(other, tmp_path / "lora")
    with pytest.raises(CheckpointError, match="lora could not be loaded"):
        LlamaEngine(checkpoint, tmp_path / "lora", device="cpu")


@pytest.mark.parametrize("what", ["missing", "empty", "cut short", "with code of its own"])
def test_what_cannot_be_loaded_is_one_error(checkpoint, tmp_path, what):
    folder = tmp_path / "model"
    if what != "missing":
        folder.mkdir()
    if what in ("cut short", "with code of its own"):
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
        if what == "cut short":
            weights = folder / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:1000])
        else:
            config = json.loads((folder / "config.json").read_text())
            config |= {"model_type": "ours", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
            (folder / "config.json").write_text(json.dumps(config))
            (folder / "code.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(CheckpointError, match="model could not be loaded"):
        LlamaEngine(folder, device="cpu")


def test_fewer_bits_need_bitsandbytes(checkpoint, monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match="pip install bitsandbytes"):
        LlamaEngine(checkpoint, load_in_kbits=4)
    monkeypatch.setattr(engines, "find_spec", lambda name: object())
    with pytest.raises(EngineError, match=r"training\.merge_lora"):
        LlamaEngine(checkpoint, ["a", "b"], load_in_kbits=8)


@pytest.mark.parametrize("bits", [8, 4])
def test_fewer_bits_answer_nearly_alike(gguf, bits, tmp_path):
    """An adapter stays beside the weights."""
    pytest.importorskip("bitsandbytes")
    wide = gguf(vocab="spm-added", dtype="f32", hidden_size=256, intermediate_size=512).with_name("hf")
    with_adapter = trained(wide, tmp_path / "lora")
    small = LlamaEngine(wide, tmp_path / "lora", load_in_kbits=bits, device="cpu")
    prompt = torch.tensor([small.prompt_tokens(CONVERSATIONS[0])])
    with torch.no_grad():
        expected, found = (model(prompt).logits.float().softmax(-1) for model in (with_adapter, small.model))
    assert 0 < float((expected - found).abs().sum(-1).mean()) < {8: 0.1, 4: 0.5}[bits]
    assert small.generate(CONVERSATIONS[0], max_new_tokens=4, **GREEDY) is not None


# The command


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["--device", "cpu", "--max-new-tokens", "6", "--temperature", "0", *map(str, arguments)])


def test_a_file_of_instructions_is_answered(checkpoint, engine, tmp_path):
    data = tmp_path / "instructions.txt"
    data.write_text("\ufeff你好\n\n用一句话解释什么是量化。\n", encoding="utf-8")
    out = tmp_path / "new" / "predictions.json"
    result = run("--base", checkpoint, "--with-prompt", "--system", "S", "--data-file", data, "--predictions-file", out)
    assert result.exit_code == 0, result.output
    answers = json.loads(out.read_text(encoding="utf-8"))
    asked = [
        [{"role": "system", "content": "S"}, {"role": "user", "content": text}] for text in ("你好", "用一句话解释什么是量化。")
    ]
    assert answers == [
        {"Input": engine.prompt_text(a), "Output": engine.generate(a, max_new_tokens=6, temperature=0)} for a in asked
    ]
    config = transformers.GenerationConfig.from_pretrained(out.parent)
    assert (config.do_sample, config.max_new_tokens, config.repetition_penalty) == (False, 6, 1.1)
    assert sorted(p.name for p in out.parent.iterdir()) == ["generation_config.json", "predictions.json"]


def test_a_bare_file_name_and_text_as_it_is(checkpoint, engine, tmp_path, monkeypatch):
    """The scripts this follows made the directory of the answers' path, which of a bare name is none."""
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text("白日依山尽", encoding="utf-8")
    result = run("--base", checkpoint, "--data-file", "in.txt", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["n"] == 1
    (answer,) = json.loads(Path("predictions.json").read_text(encoding="utf-8"))
    assert answer == {"Input": "白日依山尽", "Output": engine.generate("白日依山尽", max_new_tokens=6, temperature=0)}
    again = run("--base", checkpoint, "--data-file", "in.txt")
    assert again.exit_code == 1
    assert "--force" in again.output
    assert run("--base", checkpoint, "--data-file", "in.txt", "--force").exit_code == 0


def test_answers_are_complete_or_absent(engine, tmp_path):
    data, out = tmp_path / "in.txt", tmp_path / "out" / "predictions.json"
    data.write_text("一\n二\n", encoding="utf-8")

    def broken(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(engine, data, out, max_new_tokens=2, progress=broken)
    assert not out.parent.exists()
    out.parent.mkdir()
    (out.parent / "generation_config.json").write_text("{}")
    with pytest.raises(OutputExists):
        predict(engine, data, out, max_new_tokens=2)
    assert [p.name for p in out.parent.iterdir()] == ["generation_config.json"]


@pytest.mark.parametrize(("content", "why"), [(None, "cannot be read"), (b" \n\n", "no instructions"), (b"\xff\xfe", "UTF-8")])
def test_a_bad_file_of_instructions_is_one_error(engine, tmp_path, content, why):
    data = tmp_path / "in.txt"
    if content is not None:
        data.write_bytes(content)
    with pytest.raises(CorpusError, match=why):
        predict(engine, data, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_a_conversation_grows_and_is_broken_off(engine):
    """Ctrl-C while an answer comes leaves what was shown of it in the conversation."""
    seen, shown = [], []
    real = engine.stream
    engine.stream = lambda prompt, **how: seen.append([dict(m) for m in prompt]) or real(prompt, **how)
    questions = iter(["一", "", "二", "三"])

    def ask():
        try:
            return next(questions)
        except StopIteration:
            raise EOFError from None

    def show(pieces):
        shown.append(next(pieces, ""))
        if len(shown) == 2:
            raise KeyboardInterrupt
        shown[-1] += "".join(pieces)

    try:
        converse(engine, ask, show, with_prompt=True, system="S", max_new_tokens=5, temperature=0)
    finally:
        del engine.stream
    assert [len(s) for s in seen] == [2, 4, 6]
    assert [m["content"] for m in seen[-1]] == ["S", "一", shown[0].rstrip(), "二", shown[1].rstrip(), "三"]


def test_questions_from_a_pipe(checkpoint):
    arguments = ["--base", str(checkpoint), "--device", "cpu", "--interactive", "--with-prompt", "--max-new-tokens", "3"]
    result = CliRunner().invoke(main, arguments, input="你好\n再见\n")
    assert result.exit_code == 0, result.output
    assert result.output.count(">>> ") == 3


@pytest.mark.parametrize(
    "arguments", [[], ["--interactive", "--data-file", "x"], ["--interactive", "--system", "S"], ["--load-in-kbits", "5"]]
)
def test_flags_that_do_not_go_together(checkpoint, arguments):
    result = run("--base", checkpoint, *arguments)
    assert result.exit_code == 2


def test_a_missing_base_is_one_line(tmp_path):
    result = run("--base", tmp_path / "none", "--interactive")
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert "could not be loaded" in result.output
