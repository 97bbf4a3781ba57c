"""tools/verify_checksums.py: files as their publishers list them, tensors whatever files they lie in."""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_meta
from click.testing import CliRunner, Result
from safetensors.numpy import load_file
from tiny_meta import torch

from cnq.checkpoint import open_checkpoint
from cnq.checkpoint.digest import content_digest, tensor_digests
from cnq.convert import convert

TOOL = Path(__file__).parents[1] / "tools" / "verify_checksums.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("verify_checksums", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(tmp_path) -> Path:
    """Two shards with the checklist that Meta's download has."""
    folder = tiny_meta.checkpoint(tiny.checkpoint(tmp_path / "hf"), tmp_path / "13B", shards=2)
    files = ["consolidated.00.pth", "consolidated.01.pth", "params.json"]
    lines = [f"{hashlib.md5((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in files]
    (folder / "checklist.chk").write_text("".join(lines))
    return folder


def run(tool, *args: object) -> Result:
    return CliRunner().invoke(tool.main, [str(a) for a in args])


def published(tool, monkeypatch, model: Path, **names: str) -> None:
    """Make the files of a directory those of a published model: file name with _ for . -> what it is known as."""
    known = {hashlib.sha256((model / name.replace("_", ".")).read_bytes()).hexdigest(): what for name, what in names.items()}
    monkeypatch.setattr(tool, "KNOWN", known)


# Files


def test_the_checklist_is_right(tool, model):
    result = run(tool, model)
    assert result.exit_code == 0, result.output
    said = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert said.keys() == {str(model / name) for name in
                           ("consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model")}  # fmt: skip
    for name, word in (("consolidated.01.pth", "matches the checklist"), ("tokenizer.model", "unknown")):
        assert said[str(model / name)] == f"{word}  sha256 {hashlib.sha256((model / name).read_bytes()).hexdigest()}"


@pytest.mark.parametrize("name", ["consolidated.01.pth", "params.json"])
def test_one_bit_is_wrong(tool, model, name):
    raw = bytearray((model / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (model / name).write_bytes(raw)
    result = run(tool, model)
    assert result.exit_code == 1
    (wrong,) = [line for line in result.stdout.splitlines() if "WRONG" in line]
    assert wrong.startswith(f"{model / name}: WRONG, it is not the file of the checklist: download it again")


def test_a_file_of_the_checklist_is_missing(tool, model):
    (model / "consolidated.01.pth").unlink()
    result = run(tool, model)
    assert result.exit_code == 1
    assert f"{model / 'consolidated.01.pth'}: WRONG, it is in the checklist, but not here\n" in result.stdout


@pytest.mark.parametrize(
    "line", ["", "<html>", "0" * 32 + "  ../secret", "0" * 32 + "  /etc/passwd", "0" * 31 + "  params.json"]
)
def test_a_checklist_that_is_none(tool, model, line):
    (model / "checklist.chk").write_text(f"{line}\n")
    result = run(tool, model)
    assert result.exit_code == 1
    assert "is not the md5 and name of a file beside it" in result.stderr


def test_tokenizer_checklist_one_folder_up(tool, model):
    above = model.parent
    (model / "tokenizer.model").rename(above / "tokenizer.model")
    digest = hashlib.md5((above / "tokenizer.model").read_bytes()).hexdigest()
    (above / "tokenizer_checklist.chk").write_text(f"{digest}  ./tokenizer.model\n")
    result = run(tool, above, model)
    assert result.exit_code == 0, result.output
    assert f"{above / 'tokenizer.model'}: matches the checklist" in result.stdout


def test_published_files_are_known(tool, model, monkeypatch):
    names = {"consolidated_00_pth": "LLaMA-13B consolidated.00.pth", "consolidated_01_pth": "LLaMA-13B consolidated.01.pth",
             "tokenizer_model": "LLaMA tokenizer.model"}  # fmt: skip
    published(tool, monkeypatch, model, **names)
    result = run(tool, model)
    assert result.exit_code == 0, result.output
    for what in names.values():
        assert f"known as {what}" in result.stdout


def test_a_damaged_shard_among_known_ones(tool, model, monkeypatch):
    published(tool, monkeypatch, model, consolidated_00_pth="LLaMA-13B consolidated.00.pth",
              consolidated_01_pth="LLaMA-13B consolidated.01.pth")  # fmt: skip
    (model / "checklist.chk").unlink()
    with (model / "consolidated.01.pth").open("ab") as f:
        f.write(b"\0")
    result = run(tool, model)
    assert result.exit_code == 1
    assert "WRONG, LLaMA-13B consolidated.01.pth is missing, or not as published" in result.stdout


def test_shards_that_changed_places(tool, model, monkeypatch):
    published(tool, monkeypatch, model, consolidated_00_pth="LLaMA-13B consolidated.01.pth",
              consolidated_01_pth="LLaMA-13B consolidated.00.pth")  # fmt: skip
    result = run(tool, model)
    assert result.exit_code == 1
    assert "consolidated.00.pth: WRONG, by its content it is LLaMA-13B consolidated.01.pth" in result.stdout


def test_the_table_of_published_files(tool):
    """Every model's parts are numbered without a gap, every digest is one."""
    assert len(tool.KNOWN) == 63
    assert all(len(digest) == 64 and int(digest, 16) for digest in tool.KNOWN)
    parts: dict[str, list[str]] = {}
    for what in tool.KNOWN.values():
        if " consolidated." in what:
            parts.setdefault(what.split(" ")[0], []).append(what.split(" ")[1])
    assert {len(files) for files in parts.values()} == {1, 2, 4}
    for model, files in parts.items():
        assert files == [f"consolidated.{i:02}.pth" for i in range({"7B": 1, "13B": 2, "33B": 4}[model.rsplit("-", 1)[1]])]


def test_a_real_tokenizer_is_known(tool, tmp_path):
    real = Path(__file__).parents[2] / "shared" / "data" / "llama2-tokenizer.model"
    if not real.is_file():
        pytest.skip("no real tokenizer here")
    shutil.copy(real, tmp_path / "tokenizer.model")
    assert "known as LLaMA and LLaMA-2 tokenizer.model" in run(tool, tmp_path).stdout


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_a_model(tool, tmp_path, name):
    (tmp_path / "empty").mkdir()
    result = run(tool, tmp_path / name)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: ")


# Tensors


def test_the_content_is_one_whatever_the_container(tool, model, tmp_path):
    """.pth in shards, .bin, safetensors in one file and in three: one digest; another bit: another."""
    hf = tmp_path / "hf"
    three = tiny.checkpoint(tmp_path / "three", shards=3)
    shutil.copytree(hf, tmp_path / "bin")
    state = {name: torch.from_numpy(value) for name, value in load_file(hf / "model.safetensors").items()}
    torch.save(dict(sorted(state.items())), tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    result = run(tool, model, hf, three, tmp_path / "bin", "--content")
    assert result.exit_code == 0, result.output
    totals = [line.split("  ")[0] for line in result.stdout.splitlines() if "all 21 tensors" in line]
    assert totals == [content_digest(open_checkpoint(hf))] * 4
    state["model.norm.weight"].view(torch.int16)[3] ^= 1
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    changed = run(tool, tmp_path / "bin", "--content").stdout.splitlines()
    before = [line for line in result.stdout.splitlines() if line in changed]
    assert len(set(before)) == 20  # all tensors but the one, and not the whole
    assert not [line for line in before if "model.norm.weight" in line]


def test_a_tensors_digest_is_the_sha256_of_its_bytes(tmp_path):
    hf = tiny.checkpoint(tmp_path / "hf", dtype="BF16")
    found = tensor_digests(open_checkpoint(hf))
    raw = (hf / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    del header["__metadata__"]
    assert found.keys() == header.keys()
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        kind = f"BF16 ({', '.join(map(str, entry['shape']))}{',' if len(entry['shape']) == 1 else ''})"
        assert found[name] == (kind, hashlib.sha256(raw[begin:end]).hexdigest())


def test_type_and_shape_count(tmp_path):
    """The same bytes as float16 and as bfloat16, or in other rows, are other tensors."""
    from cnq.checkpoint.digest import overall

    digests = {overall({"w": (kind, "00" * 32)}) for kind in ("F16 (4, 8)", "BF16 (4, 8)", "F16 (8, 4)")}
    assert len(digests) == 3


def test_a_gguf_in_float32_has_the_digest_of_its_checkpoint(tmp_path):
    hf = tiny.checkpoint(tmp_path / "hf", dtype="F32")
    gguf = convert(hf, tmp_path / "m.gguf", dtype="f32").path
    heard: list[tuple[int, int]] = []
    assert content_digest(open_checkpoint(gguf), lambda *a: heard.append(a)) == content_digest(open_checkpoint(hf))
    assert heard[-1][0] == heard[-1][1] == sum(v.nbytes for v in load_file(hf / "model.safetensors").values())
    assert np.all(np.diff([done for done, _ in heard]) > 0)


def test_half_a_model_has_no_digest(tool, model):
    (model / "params.json").write_text(json.dumps(json.loads((model / "params.json").read_text()) | {"n_layers": 3}))
    result = run(tool, model, "--content")
    assert result.exit_code == 1
    assert "tensors are missing" in result.stderr


def test_as_a_program(model):
    done = subprocess.run([sys.executable, TOOL, model], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.count("matches the checklist") == 3
