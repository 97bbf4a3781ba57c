"""Perplexity and divergence: llama-perplexity's printed figures, and ten lines of numpy."""

import json
from pathlib import Path

import make_tools
import numpy as np
import pytest
from click.testing import CliRunner
from test_imatrix import text

from cnq import files
from cnq.cli import cli
from cnq.engine.model import Model
from cnq.errors import EngineError, GgufError, NoSpace
from cnq.evaluate import evaluate
from cnq.imatrix import with_bos
from cnq.logits_file import LogitsFile
from cnq.quantize import quantize

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tools.json").read_text())["perplexity"]


@pytest.fixture(scope="module")
def models(gguf, tmp_path_factory):
    f16 = gguf()
    return f16, quantize(f16, tmp_path_factory.mktemp("q") / "q4_0.gguf", "Q4_0").path


def run(models, **options):
    settings = {"n_ctx": make_tools.N_CTX, "base": models[0]} | options
    return evaluate([models[1]], settings.pop("text", text()), **settings)


def test_the_figures_are_those_of_llama_perplexity(models):
    """PPL to 1e-3, KLD to 1 %: the reference's base went through a file of 16-bit codes."""
    found = run(models).models[0]
    a = found.against
    assert found.ppl.value == pytest.approx(GOLDEN["ppl"][0], rel=1e-3)
    assert found.ppl.error == pytest.approx(GOLDEN["ppl"][1], rel=1e-3)
    assert a.ppl_base.value == pytest.approx(GOLDEN["ppl_base"][0], rel=1e-3)
    assert a.ratio.value == pytest.approx(GOLDEN["ratio"][0], rel=1e-3)
    assert a.ratio.error == pytest.approx(GOLDEN["ratio"][1], rel=1e-2)
    assert a.kld.value == pytest.approx(GOLDEN["kld"][0], rel=1e-2)
    assert a.kld.error == pytest.approx(GOLDEN["kld"][1], rel=2e-2)
    assert a.kld_percentiles[99] == pytest.approx(GOLDEN["kld_99"][0], rel=1e-2)
    assert a.kld_percentiles[50] == pytest.approx(GOLDEN["kld_median"][0], rel=1e-2)
    assert a.dp_rms.value == pytest.approx(GOLDEN["dp_rms"][0], abs=1e-3)
    assert a.same_top.value == pytest.approx(GOLDEN["same_top"][0], abs=1.0)


def test_the_figures_follow_their_definitions(models):
    """Against plain numpy in float64 on the same logits."""
    found = run(models)
    nll, nll_base, kld, same, n_bytes = [], [], [], [], 0
    with Model(models[0], n_ctx=64, n_batch=64) as base, Model(models[1], n_ctx=64, n_batch=64) as model:
        made = text()(base)
        for tokens in made.tokens:
            ids = with_bos(base, tokens)
            p, q = (m.logits(ids)[32:-1].astype(np.float64) for m in (base, model))
            p, q = (
                x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True) for x in (p, q)
            )
            rows, targets = np.arange(31), tokens[33:]
            nll += (-q[rows, targets]).tolist()
            nll_base += (-p[rows, targets]).tolist()
            kld += (np.exp(p) * (p - q)).sum(1).tolist()
            same += (p.argmax(1) == q.argmax(1)).tolist()
            n_bytes += sum(len(base.piece(int(t))) for t in targets)
    m = found.models[0]
    assert m.ppl.value == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)
    assert found.base.ppl.value == pytest.approx(np.exp(np.mean(nll_base)), rel=1e-5)
    assert m.bits_per_byte == pytest.approx(np.sum(nll) / np.log(2) / n_bytes, rel=1e-5)
    assert m.against.kld.value == pytest.approx(np.mean(kld), rel=1e-3)
    assert np.allclose(m.klds, kld, atol=1e-4)
    assert m.against.same_top.value == pytest.approx(100 * np.mean(same))
    assert found.n_scored == len(nll) == 31 * make_tools.CHUNKS


def test_a_model_against_itself_has_lost_nothing(models):
    found = run((models[0], models[0])).models[0].against
    assert found.kld.value == pytest.approx(0, abs=1e-6)
    assert found.same_top.value == 100
    assert found.ratio.value == pytest.approx(1)


def test_several_models_in_one_run_give_what_each_gives_alone(models, tmp_path):
    q8 = quantize(models[0], tmp_path / "q8.gguf", "Q8_0").path
    both = evaluate([models[1], q8], text(), base=models[0], n_ctx=64).models
    assert both[0].against == run(models).models[0].against
    assert both[1].against.kld.value < both[0].against.kld.value / 10


def test_a_file_of_base_logits_serves_in_place_of_the_base(models, tmp_path):
    path = tmp_path / "base.kld"
    direct = run(models, logits=path).models[0]
    file = LogitsFile(path)
    assert (file.n_ctx, file.n_chunks, file.n_vocab) == (64, make_tools.CHUNKS, 420)
    stored = evaluate([models[1]], None, logits=path, n_ctx=64).models[0]
    assert stored.ppl == direct.ppl
    assert stored.against.kld.value == pytest.approx(direct.against.kld.value, rel=1e-2)
    assert stored.against.ppl_base.value == pytest.approx(direct.against.ppl_base.value, rel=1e-3)


def test_without_memory_for_both_the_base_goes_through_a_file(models, tmp_path, monkeypatch):
    import cnq.evaluate as module

    direct = run(models)
    most = module._memory([models[0], models[1]])
    monkeypatch.setattr(module, "free_memory", lambda: most - 1)
    found = run(models)
    assert found.base.ppl == direct.base.ppl
    assert found.models[0].ppl == direct.models[0].ppl
    assert found.models[0].against.base == direct.models[0].against.base
    assert found.models[0].against.kld.value == pytest.approx(direct.models[0].against.kld.value, rel=1e-2)
    assert found.manifest == direct.manifest
    assert not [p for p in models[1].parent.iterdir() if p.name.startswith(".cnq-")]
    monkeypatch.setattr(files, "free_memory", lambda: 1000)
    monkeypatch.setattr(module, "free_memory", lambda: 1000)
    with pytest.raises(NoSpace, match="of memory needed"):
        run(models)


def test_the_base_alone_writes_the_same_file(models, tmp_path):
    run(models, logits=tmp_path / "a.kld")
    evaluate([models[0]], text(), logits=tmp_path / "b.kld", n_ctx=64)
    assert (tmp_path / "a.kld").read_bytes() == (tmp_path / "b.kld").read_bytes()


def test_other_vocabularies_are_refused(models, gguf):
    with pytest.raises(EngineError, match="another vocabulary"):
        run((models[0], gguf(vocab="spm-added")))


@pytest.mark.parametrize("damage", [b"", b"_logits_", b"GGUF" + bytes(100), "cut"])
def test_a_damaged_file_of_logits_is_refused(models, tmp_path, damage):
    path = tmp_path / "base.kld"
    run(models, logits=path)
    path.write_bytes(path.read_bytes()[:-10] if damage == "cut" else damage)
    with pytest.raises(GgufError):
        evaluate([models[1]], None, logits=path, n_ctx=64)


def test_the_command(models, tmp_path):
    (tmp_path / "text.txt").write_text(make_tools.text())
    arguments = ["evaluate", str(models[1]), "--against", str(models[0]), "--text", str(tmp_path / "text.txt"), "--ctx", "64"]
    result = CliRunner().invoke(cli, [*arguments, "--chunks", "4"])
    assert result.exit_code == 0, result.output
    assert "mean KLD" in result.output
    found = json.loads(CliRunner().invoke(cli, [*arguments, "--chunks", "4", "--json"]).stdout)
    assert found["models"][0]["against"]["kld"]["value"] > 0
    short = CliRunner().invoke(cli, [*arguments[:-1], "16384"])
    assert short.exit_code == 1
    assert "at least 2" in short.output
