"""Quantizing: what llama.cpp would do is known beforehand, and done."""

import ctypes
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from test_bad_input import altered

from cnq.engine import child as children
from cnq.engine.worker import ftypes
from cnq.errors import ImatrixRequired, QuantizeError
from cnq.gguf_file import GgufFile
from cnq.imatrix_file import read_imatrix
from cnq.quantize import plan, quantize


def write_imatrix(gguf: Path, path: Path) -> Path:
    """An importance matrix of random positive numbers for every block matrix of a GGUF."""
    import gguf as lib

    random = np.random.default_rng(0)
    writer = lib.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["random"])
    writer.add_uint32("imatrix.chunk_count", 4)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, info in GgufFile(gguf).tensors.items():
        if name.startswith("blk.") and len(info.shape) > 1:
            matrices = info.shape[0] if len(info.shape) == 3 else 1
            writer.add_tensor(f"{name}.in_sum2", random.gamma(1, 100, (matrices, info.shape[-1])).astype(np.float32))
            writer.add_tensor(f"{name}.counts", np.full((matrices, 1), 2048, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def imatrix(wide_gguf, tmp_path_factory):
    return write_imatrix(wide_gguf, tmp_path_factory.mktemp("imatrix") / "im.gguf")


def types_of(path: Path) -> dict[str, str]:
    return {name: t.type.name for name, t in GgufFile(path).tensors.items()}


def llama_quantize(src: Path, dst: Path, type: str, imatrix: Path | None = None) -> bool:
    """The reference itself: llama_model_quantize, all that llama-quantize calls. False when it refuses."""
    import llama_cpp.llama_cpp as lib

    params = lib.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = ftypes()[type], True
    means = read_imatrix(imatrix).means() if imatrix else {}
    data = (lib.llama_model_imatrix_data * (len(means) + 1))()
    for slot, (name, values) in zip(data, means.items(), strict=False):
        slot.name, slot.size = name.encode(), values.size
        slot.data = values.ctypes.data_as(dict(slot._fields_)["data"])
    if imatrix:
        params.imatrix = ctypes.cast(data, dict(params._fields_)["imatrix"])
    return lib.llama_model_quantize(os.fsencode(src), os.fsencode(dst), ctypes.byref(params)) == 0


@pytest.mark.parametrize("type", ftypes())
def test_every_type_is_llama_cpps_to_the_byte(type, wide_gguf, imatrix, tmp_path):
    """The whole file without an imatrix, which some types are refused without; every tensor with one. And as planned."""
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    if llama_quantize(wide_gguf, theirs, type):
        quantize(wide_gguf, ours, type)
        assert ours.read_bytes() == theirs.read_bytes()
    else:
        with pytest.raises(ImatrixRequired, match="--imatrix"):
            plan(wide_gguf, type)
    assert llama_quantize(wide_gguf, theirs, type, imatrix)
    planned = plan(wide_gguf, type, imatrix=imatrix)
    quantize(wide_gguf, ours, type, imatrix=imatrix, force=True)
    assert same_tensors(ours, theirs)
    assert types_of(ours) == {t.name: t.type for t in planned.tensors}
    assert ours.stat().st_size == planned.nbytes
    assert GgufFile(ours).bits_per_weight == pytest.approx(planned.bits_per_weight)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "q8_0"])
def test_every_source_is_read_as_llama_cpp_reads_it(dtype, gguf, tmp_path):
    src = gguf(dtype=dtype, hidden_size=256, intermediate_size=512)
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    assert llama_quantize(src, theirs, "Q3_K_M")
    quantize(src, ours, "Q3_K_M", allow_requantize=True, threads=3)
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("type", ["Q4_0", "IQ4_NL"])
def test_each_expert_has_its_own_importance(type, tmp_path):
    src = tiny.moe_gguf(tmp_path / "moe.gguf")
    imatrix = write_imatrix(src, tmp_path / "im.gguf")
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    assert llama_quantize(src, theirs, type, imatrix)
    quantize(src, ours, type, imatrix=imatrix)
    assert same_tensors(ours, theirs)


def test_weights_that_are_not_finite_are_named(gguf, tmp_path):
    src = tmp_path / "nan.gguf"
    raw = bytearray(gguf().read_bytes())
    file = GgufFile(gguf())
    at = file.data_start + file.tensors["blk.1.ffn_up.weight"].offset
    raw[at + 2 : at + 4] = np.float16("nan").tobytes()
    src.write_bytes(raw)
    with pytest.raises(QuantizeError, match=r"blk\.1\.ffn_up\.weight.* NaN"):
        quantize(src, tmp_path / "q.gguf", "Q4_0")
    assert not (tmp_path / "q.gguf").exists()


def same_tensors(one: Path, two: Path) -> bool:
    a, b = GgufFile(one), GgufFile(two)
    facts = [[(t.name, t.type, t.shape, t.data.tobytes()) for t in map(f.tensor, f.tensors)] for f in (a, b)]
    return facts[0] == facts[1]


def test_a_pure_type_that_would_abort_llama_cpp_is_refused(wide_gguf, imatrix, tmp_path):
    """No importance data is collected for the embedding, and ggml aborts the process for lack of it."""
    with pytest.raises(ImatrixRequired, match=r"--embedding-type|--output-type"):
        quantize(wide_gguf, tmp_path / "q.gguf", "IQ1_S", imatrix=imatrix, pure=True)
    options = {"embedding_type": "Q4_K", "output_type": "Q4_K", "pure": True}
    assert quantize(wide_gguf, tmp_path / "q.gguf", "IQ1_S", imatrix=imatrix, **options).nbytes


def test_the_imatrix_changes_codes_and_is_told_of_in_the_file(wide_gguf, imatrix, tmp_path):
    plain = GgufFile(quantize(wide_gguf, tmp_path / "plain.gguf", "Q4_K_M").path)
    weighed = GgufFile(quantize(wide_gguf, tmp_path / "weighed.gguf", "Q4_K_M", imatrix=imatrix).path)
    name = "blk.0.ffn_up.weight"
    assert plain.tensor(name).data.tobytes() != weighed.tensor(name).data.tobytes()
    assert weighed.fields["quantize.imatrix.file"] == "im.gguf"
    assert weighed.fields["quantize.imatrix.entries_count"] == 14
    assert weighed.fields["quantize.imatrix.chunks_count"] == 4


def test_legacy_and_gguf_imatrix_give_the_same_codes(wide_gguf, imatrix, tmp_path):
    importance = read_imatrix(imatrix)
    dat = tmp_path / "im.dat"
    with dat.open("wb") as f:  # llama-imatrix --output-format dat: sums are mean * passes
        f.write(np.int32(len(importance.sums)).tobytes())
        for name, mean in importance.means().items():
            f.write(np.int32(len(name)).tobytes() + name.encode())
            f.write(np.array([4, mean.size], np.int32).tobytes() + (mean * 4).astype(np.float32).tobytes())
        f.write(np.array([4, 6], np.int32).tobytes() + b"random")
    one = GgufFile(quantize(wide_gguf, tmp_path / "a.gguf", "Q3_K_M", imatrix=imatrix).path)
    two = GgufFile(quantize(wide_gguf, tmp_path / "b.gguf", "Q3_K_M", imatrix=dat).path)
    assert all(one.tensor(n).data.tobytes() == two.tensor(n).data.tobytes() for n in one.tensors)


def test_a_model_that_was_split_into_one_file(wide_gguf, tmp_path):
    """llama-gguf-split says so in keys that llama-quantize leaves out."""
    path = tmp_path / "one-00001-of-00001.gguf"
    one = (2, struct.pack("<H", 1))
    altered(wide_gguf, path, {"split.no": (2, struct.pack("<H", 0)), "split.count": one, "split.tensors.count": one})
    assert llama_quantize(path, tmp_path / "theirs.gguf", "Q4_K_M")
    ours = quantize(path, tmp_path / "ours.gguf", "Q4_K_M").path
    assert ours.read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_rows_that_do_not_fill_a_block_fall_back_and_that_is_said(gguf):
    planned = plan(gguf(), "Q4_K_M")  # rows of 64 and 96
    assert any("rows of 64, 96 do not fill blocks of 256" in note for note in planned.notes)
    fallen = [t for t in planned.tensors if t.wanted]
    assert f"{len(fallen)} of {len(planned.tensors)} tensors fell back" in planned.notes[0]


def test_an_override_changes_its_tensor_and_no_other(wide_gguf, tmp_path):
    """llama.cpp's schedule of mixtures counts the tensors it decides; a partial override must not shift it."""
    stock = {t.name: t.type for t in plan(wide_gguf, "Q4_K_M").tensors}
    wishes = [(r"blk\.0\.ffn_down", "Q8_0"), ("attn_v", "Q5_0")]
    changed = types_of(quantize(wide_gguf, tmp_path / "q.gguf", "Q4_K_M", tensor_types=wishes).path)
    want = stock | {"blk.0.ffn_down.weight": "Q8_0", "blk.0.attn_v.weight": "Q5_0", "blk.1.attn_v.weight": "Q5_0"}
    assert changed == want


def test_output_embedding_and_pure(wide_gguf, tmp_path):
    options = {"output_type": "Q8_0", "embedding_type": "F16", "pure": True}
    types = types_of(quantize(wide_gguf, tmp_path / "q.gguf", "Q4_K_M", **options).path)
    assert types["output.weight"] == "Q8_0"
    assert types["token_embd.weight"] == "F16"
    assert {t for name, t in types.items() if name.startswith("blk.") and "norm" not in name} == {"Q4_K"}


def test_a_quantized_file_is_quantized_again_only_when_told(wide_gguf, tmp_path):
    q8 = quantize(wide_gguf, tmp_path / "q8.gguf", "Q8_0").path
    with pytest.raises(QuantizeError, match="--allow-requantize"):
        quantize(q8, tmp_path / "q4.gguf", "Q4_0")
    assert quantize(q8, tmp_path / "q4.gguf", "Q4_0", allow_requantize=True).nbytes < q8.stat().st_size


def test_a_crash_of_native_code_is_one_error(wide_gguf, tmp_path, monkeypatch):
    """The child is killed as soon as it is at work: nothing is left, and the signal is named."""
    real = subprocess.Popen

    def dying(*args, **kwargs):
        child = real(*args, **kwargs)
        child.kill()
        return child

    monkeypatch.setattr(children.subprocess, "Popen", dying)
    with pytest.raises(QuantizeError, match=r"SIGKILL"):
        quantize(wide_gguf, tmp_path / "q.gguf", "Q4_K_M")
    assert not list(tmp_path.iterdir())


def test_the_child_ends_when_its_parent_is_gone(wide_gguf):
    """The end of its stdin is how it learns: no quantizer goes on after a kill -9 of cnq."""
    child = subprocess.Popen([sys.executable, "-m", "cnq.engine.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdin.close()
    child.wait(timeout=60)
    child.stdout.close()
