"""Rounding layer by layer: a layer alone is the model's own, what went wrong is made up for, and nothing stays behind."""

import gc
import json
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import test_compensation
import test_hessian
import tiny
from click.testing import CliRunner

from cnq.cli import cli
from cnq.corpus import Chunks, Used
from cnq.engine import ggml, rows
from cnq.engine.compensate import Hessian
from cnq.engine.factor import ridge
from cnq.engine.layer import Layer
from cnq.engine.model import Model
from cnq.engine.quantizer import DAMPING
from cnq.engine.sequential import _solved
from cnq.errors import NoSpace, QuantizeError, StatisticsError
from cnq.gguf_file import GgufFile
from cnq.hessian_file import beside, between_bytes, digest_of, is_held, read_statistics, signs
from cnq.quantize import _require_layers, plan, quantize

N_CTX = test_hessian.N_CTX
CHUNKS = 40
TYPE = "Q3_K_M"


def run(path, tokens):
    """What a whole model multiplies its weights with, and its hidden states: name -> (tokens, columns)."""
    known, seen = GgufFile(path).tensors, {}

    def watch(tensor, ask):
        product = tensor.op in (ggml.op("MUL_MAT"), ggml.op("MUL_MAT_ID"))
        name = (tensor.src[0].contents if product else tensor).name.decode()
        if not ((product and name in known) or name.startswith(("l_out-", "ffn_inp-"))):
            return not ask
        if not ask:
            shown = tensor.src[1].contents if product else tensor
            seen[name] = ggml.array(shown).reshape(-1, shown.ne[0]).copy()
        return True

    with Model(path, n_ctx=N_CTX, n_batch=N_CTX, n_threads=2, watch=watch, writable=True) as model:
        model.feed(tokens)
    return seen


@pytest.fixture(scope="module")
def calibrated(wide_gguf, tmp_path_factory):
    dst = tmp_path_factory.mktemp("calibrated") / "im.gguf"
    return test_hessian.calibrated(wide_gguf, dst, CHUNKS)


@pytest.fixture(scope="module")
def rounded(wide_gguf, calibrated, tmp_path_factory):
    """rounding -> result."""
    folder = tmp_path_factory.mktemp("rounded")
    return {
        how: quantize(wide_gguf, folder / f"{how}.gguf", TYPE, imatrix=calibrated, rounding=how, threads=1)
        for how in ("plain", "compensated", "sequential")
    }


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "internlm2", "mixtral", "tied"])
def test_a_layer_alone_computes_what_it_does_in_the_model(family, gguf, tmp_path):
    settings = {"tie_word_embeddings": True} if family == "tied" else {"family": family}
    path = gguf(hidden_size=256, intermediate_size=512, **settings)
    file, tokens = GgufFile(path), np.random.default_rng(0).integers(3, 300, N_CTX).tolist()
    whole = run(path, tokens)
    types = {name: t.type for name, t in file.tensors.items()}
    states = file.tensor("token_embd.weight").float32()[tokens]
    for number in range(2):
        names = [name for name in whole if name.startswith(f"blk.{number}.")]
        assert len(names) >= 7
        data = {name: file.tensor(name).data for name in types}
        with Layer(file, number, types, data.get, tmp_path / "layer.gguf", n_ctx=N_CTX, threads=1) as layer:
            found = layer.through(states, names, ["l_out-0"])
        states = found.pop("l_out-0")
        assert np.array_equal(states, whole[f"l_out-{number}"])
        assert all(np.array_equal(found[name], whole[name]) for name in names)
    assert not list(tmp_path.iterdir())


def test_weights_laid_over_are_those_computed_with(wide_gguf, tmp_path):
    """As if they had been in the file from the start."""
    file, random = GgufFile(wide_gguf), np.random.default_rng(0)
    types = {name: t.type for name, t in file.tensors.items()}
    data = {name: file.tensor(name).data for name in types}
    name, states = "blk.1.ffn_up.weight", random.normal(size=(N_CTX, 256)).astype(np.float32)
    found = []
    for missing in (None, name):
        own = data | ({missing: None} if missing else {})
        with Layer(file, 1, types, own.get, tmp_path / "layer.gguf", n_ctx=N_CTX, threads=1) as layer:
            if missing:
                layer.locate([name])
                layer.write(name, data[name])
            found.append(layer.through(states, [], ["l_out-0"])["l_out-0"])
    assert np.array_equal(*found)
    assert np.abs(found[0]).max() > 0


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc/self/maps")
def test_a_layer_that_is_closed_gives_back_the_disk_at_once(wide_gguf, tmp_path):
    """Its file is unlinked, and mapped no longer: not only when Python looks for cycles."""
    file = GgufFile(wide_gguf)
    types = {name: t.type for name, t in file.tensors.items()}
    path, states = tmp_path / "layer.gguf", np.ones((N_CTX, 256), np.float32)
    gc.disable()
    try:
        with Layer(file, 1, types, lambda name: file.tensor(name).data, path, n_ctx=N_CTX, threads=1) as layer:
            layer.through(states, [], ["l_out-0"])
        assert str(path) not in Path("/proc/self/maps").read_text()
    finally:
        gc.enable()


def test_the_correction_is_numpys():
    """C (H + ridge)⁻¹."""
    random = np.random.default_rng(0)
    x, cross = random.normal(size=(900, 300)).astype(np.float32), random.normal(size=(70, 300)).astype(np.float32)
    hessian = Hessian(x.T @ x, x, 900, 900)
    want = cross @ np.linalg.inv((hessian.fit + np.diag(ridge(hessian.fit, DAMPING))).astype(np.float64))
    with ThreadPoolExecutor(2) as pool:
        assert _solved(cross, hessian, pool) == pytest.approx(want, rel=1e-3, abs=1e-3 * np.abs(want).max())


def test_types_and_bytes_stay_and_keys_tell_of_it(rounded, calibrated):
    plain, mine = (test_compensation.data(rounded[how].path) for how in ("plain", "sequential"))
    assert [(n, *t[:2], len(t[2])) for n, t in plain.items()] == [(n, *t[:2], len(t[2])) for n, t in mine.items()]
    fields = GgufFile(rounded["sequential"].path).fields
    assert fields["cnq.rounding.method"] == rounded["sequential"].rounding == "sequential"
    assert fields["cnq.rounding.statistics"] == read_statistics(beside(calibrated)).digest
    changed = {name for name in plain if plain[name] != mine[name]}
    assert changed == {o.name for o in rounded["sequential"].compensation if o.kept}
    assert len(changed) >= 12
    assert not [p for p in rounded["sequential"].path.parent.iterdir() if p.suffix != ".gguf"]


def test_hidden_states_are_nearer_to_the_float_models_on_other_text(rounded, wide_gguf):
    random = np.random.default_rng(99)
    texts = [random.integers(3, 300, N_CTX).tolist() for _ in range(8)]
    exact = [run(wide_gguf, tokens)["l_out-1"] for tokens in texts]
    off = {
        how: sum(float(np.square(run(r.path, t)["l_out-1"] - e).sum()) for t, e in zip(texts, exact, strict=True))
        for how, r in rounded.items()
    }
    assert off["compensated"] < 0.95 * off["plain"]
    assert off["sequential"] < 0.9 * off["compensated"]


@pytest.mark.parametrize("kind", ["all K", "products that see other forms of an input", "experts between", "bf16"])
def test_the_losses_told_are_those_between_the_two_models(kind, rounded, wide_gguf, gguf, calibrated, tmp_path):
    """Recomputed by numpy from the finished file, run whole, over the chunks held back; with the sketch's signs."""
    path, imatrix, result = wide_gguf, calibrated, rounded["sequential"]
    options = {"rounding": "sequential", "tensor_types": [("attn_v", "Q5_0")] if "forms" in kind else []}
    if kind in ("experts between", "bf16"):
        family = {"family": "mixtral"} if "experts" in kind else {"dtype": "bf16"}
        path = gguf(hidden_size=256, intermediate_size=512, **family)
        imatrix = test_hessian.calibrated(path, tmp_path / "im.gguf", CHUNKS)
    if kind != "all K":
        result = quantize(path, tmp_path / "q.gguf", TYPE, imatrix=imatrix, **options)
    simple = quantize(path, tmp_path / "p.gguf", TYPE, imatrix=imatrix, **options | {"rounding": "plain"}).path
    tokens = read_statistics(beside(imatrix)).tokens()
    files = [GgufFile(p) for p in (path, result.path, simple)]
    names = [o.name for o in result.compensation if o.expert is None]
    exact, rough, plain = ({n: f.tensor(n).float32().astype(np.float64) for n in (*names, "token_embd.weight")} for f in files)
    seen = {name: [0, 0, 0] for name in names}
    held = [k for k in range(CHUNKS) if is_held(k)]
    for k in held:
        a, b = (run(p, tokens[k].tolist()) for p in (path, result.path))
        for states, model in ((a, exact), (b, rough)):
            states["l_out--1"] = model["token_embd.weight"][tokens[k]]
        drawn = signs(k, N_CTX).T.astype(np.float64)
        for name in names:
            x, y, r = a[name], rows.rounded_inputs(b[name], files[1].tensors[name].type), np.zeros((N_CTX, 1))
            if name.endswith(("attn_output.weight", "ffn_down.weight")):
                layer = int(name.split(".")[1])
                state = f"l_out-{layer - 1}" if "attn" in name else f"ffn_inp-{layer}"
                after = a[f"ffn_inp-{layer}" if "attn" in name else f"l_out-{layer}"]
                share = 1 / np.sqrt(np.square(after).mean(1, keepdims=True))
                x, y, r = x * share, y * share, (a[state] - b[state]) * share
            seen[name] = [have + drawn @ more for have, more in zip(seen[name], (x, y, r), strict=True)]
    assert len(names) >= (8 if "experts" in kind else 14)
    for o in result.compensation:
        if o.expert is None:
            x, y, r = seen[o.name]
            target = x @ exact[o.name].T + r
            found = [np.square(target - y @ w[o.name].T).sum() / (len(held) * N_CTX) for w in (plain, rough)]
            assert [o.loss_plain, o.loss] == pytest.approx(found, rel=5e-3), o.name


def test_threads_change_nothing(rounded, wide_gguf, calibrated, tmp_path):
    between = []

    def heard(*_):
        between.append(len(list(tmp_path.glob(".cnq-*/*"))))

    options = {"imatrix": calibrated, "rounding": "sequential", "threads": 3, "progress": heard}
    again = quantize(wide_gguf, tmp_path / "q.gguf", TYPE, **options)
    assert again.path.read_bytes() == rounded["sequential"].path.read_bytes()
    assert max(between) == 0  # the disk is free again whatever happens


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_embedding_is_rounded_first_and_an_output_last(tied, gguf, tmp_path):
    path = gguf(hidden_size=256, intermediate_size=512, tie_word_embeddings=tied)
    imatrix = test_hessian.calibrated(path, tmp_path / "im.gguf", CHUNKS)
    found = quantize(path, tmp_path / "q.gguf", TYPE, imatrix=imatrix, rounding="sequential")
    names = [o.name for o in found.compensation]
    assert (names[0] == "token_embd.weight") == tied
    assert (names[-1] == "output.weight") == (not tied)
    assert len(names) == 15


def test_experts_are_rounded_as_before_among_layers_that_are_not(tmp_path):
    path = tiny.moe_gguf(tmp_path / "moe.gguf", experts=2, used=1)
    imatrix = test_hessian.calibrated(path, tmp_path / "im.gguf", CHUNKS)
    one, two = (
        quantize(path, tmp_path / f"{how}.gguf", "Q4_0", imatrix=imatrix, rounding=how) for how in ("compensated", "sequential")
    )
    before, after = ({(o.name, o.expert): o for o in r.compensation} for r in (one, two))
    assert before.keys() == after.keys()
    assert {key for key, o in before.items() if o == after[key]} == {key for key in before if key[1] is not None}
    files = [test_compensation.data(r.path) for r in (one, two)]
    assert all(files[0][name] == files[1][name] for name, expert in before if expert is not None)
    assert files[0] != files[1]


def test_types_whose_codes_stand_for_groups_are_run_with_as_they_are(wide_gguf, calibrated, tmp_path):
    found = quantize(wide_gguf, tmp_path / "q.gguf", "IQ3_S", imatrix=calibrated, rounding="sequential")
    fixed = {o.type for o in found.compensation if o.reason}
    assert fixed
    assert fixed <= {"IQ3_S", "IQ3_XXS"}
    assert any(o.kept for o in found.compensation)


def test_what_it_cannot_do_is_refused_and_leaves_nothing(wide_gguf, gguf, calibrated, tmp_path):
    imatrix = tmp_path / calibrated.name
    imatrix.write_bytes(calibrated.read_bytes())
    shutil.copytree(beside(calibrated), beside(imatrix))
    before = sorted(tmp_path.iterdir())

    def refused(error, match):
        with pytest.raises(error, match=match):
            quantize(wide_gguf, tmp_path / "q.gguf", TYPE, imatrix=imatrix, rounding="sequential")
        assert sorted(tmp_path.iterdir()) == before

    tokens = beside(imatrix) / "tokens.npy"
    kept = tokens.read_bytes()
    tokens.unlink()
    refused(StatisticsError, r"tokens\.npy cannot be read.*cnq imatrix --hessian")
    tokens.write_bytes(kept[:-4])
    refused(StatisticsError, r"tokens\.npy cannot be read")
    tokens.write_bytes(kept[:-4] + b"\1\0\0\0")
    refused(StatisticsError, "not the text of these statistics")
    other = np.load(beside(calibrated) / "tokens.npy")[::-1]
    with tokens.open("wb") as f:
        np.save(f, np.ascontiguousarray(other))
    manifest = beside(imatrix) / "manifest.json"
    told = json.loads(manifest.read_text())
    told["source"]["text"] = digest_of(other)
    manifest.write_text(json.dumps(told))
    refused(QuantizeError, "its layers, run one by one, compute something else.*--rounding compensated")


def test_models_whose_layers_are_not_alone_what_they_are_together_are_refused(gguf, wide_gguf, tmp_path):
    path = gguf(family="baichuan-7b")
    imatrix = test_hessian.calibrated(path, tmp_path / "im.gguf", test_hessian.N_CHUNKS)
    with pytest.raises(QuantizeError, match=r"Baichuan from the other by the number of its layers.*--rounding compensated"):
        plan(path, "Q8_0", imatrix=imatrix, rounding="sequential")
    file = GgufFile(wide_gguf)
    file.fields["llama.attention.head_count_kv"] = [2, 4]
    with pytest.raises(QuantizeError, match=r"llama\.attention\.head_count_kv for each layer by itself"):
        _require_layers(file)


def test_ctrl_c_leaves_nothing(wide_gguf, calibrated, tmp_path):
    command = [sys.executable, "-m", "cnq", "quantize", str(wide_gguf), str(tmp_path / "q.gguf"), "-t", TYPE,
               "--imatrix", str(calibrated), "--rounding", "sequential"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".cnq-*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    assert list(tmp_path.glob(".cnq-*"))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not list(tmp_path.iterdir())


def test_the_command(wide_gguf, calibrated, tmp_path):
    command = ["quantize", str(wide_gguf), str(tmp_path / "q.gguf"), "-t", TYPE, "--imatrix", str(calibrated), "--json"]
    result = CliRunner().invoke(cli, [*command, "--rounding", "sequential"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rounding"] == "sequential"


def test_to_a_size_and_again_from_its_recipe(wide_gguf, calibrated, tmp_path):
    """The one file that stays is rounded so; those that it is compared with are not."""
    words, dst = tmp_path / "words.txt", tmp_path / "q.gguf"
    words.write_text("\n".join(tiny.SENTENCES * 30))
    command = ["quantize", str(wide_gguf), str(dst), "--bpw", "4.5", "--imatrix", str(calibrated), "--rounding", "sequential",
               "--text", str(words), "--held-out", str(words), "--eval-chunks", "2", "--effort", "fast", "--json"]  # fmt: skip
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    own, *others = found["contenders"]
    assert own["rounding"] == "sequential"
    assert {c["rounding"] for c in others} == {"plain", "compensated"}
    assert found["kept"] == "allocation"
    again = tmp_path / "again.gguf"
    command = ["quantize", str(wide_gguf), str(again), "--recipe", found["recipe"], "--imatrix", str(calibrated)]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    assert again.read_bytes() == dst.read_bytes()


def test_the_disk_it_takes_is_asked_for_before_the_work(wide_gguf, tmp_path, monkeypatch):
    """For the inputs of a layer with the output's, and its weights; not for what experts see."""
    moe = tiny.moe_gguf(tmp_path / "moe.gguf", experts=8, used=1)
    need = {}
    for name, path in (("wide", wide_gguf), ("moe", moe)):
        imatrix = test_hessian.calibrated(path, tmp_path / f"{name}.im.gguf", CHUNKS)
        need[name] = between_bytes(GgufFile(path), read_statistics(beside(imatrix)))
        layer = sum(t.nbytes for n, t in GgufFile(path).tensors.items() if n.startswith("blk.0."))
        heads = GgufFile(path).tensors["blk.0.attn_output.weight"].shape[1]
        hidden = GgufFile(path).tensors["token_embd.weight"].shape[1]
        columns = 5 * hidden + heads + 512 if name == "wide" else 4 * hidden + heads
        assert need[name] == layer + 4 * CHUNKS * N_CTX * columns
    free = plan(wide_gguf, TYPE).nbytes + need["wide"] - 1
    monkeypatch.setattr("cnq.files.shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(free, 0, free))
    with pytest.raises(NoSpace):
        quantize(wide_gguf, tmp_path / "q.gguf", TYPE, imatrix=tmp_path / "wide.im.gguf", rounding="sequential")


def test_chunks_longer_than_a_batch(wide_gguf, tmp_path):
    """Statistics too: a chunk is one pass."""
    tokens = np.random.default_rng(0).integers(3, 300, (6, 640)).astype(np.int32)
    text = Chunks(tokens, (Used("ids", "0" * 64, None, 1, 1, tokens.size, 6),))
    imatrix = test_hessian.run(wide_gguf, tmp_path / "im.gguf", text=lambda model: text, n_ctx=640).path
    assert read_statistics(beside(imatrix)).inputs[0].n_fit == 5 * 640
    found = quantize(wide_gguf, tmp_path / "q.gguf", TYPE, imatrix=imatrix, rounding="sequential")
    assert len([o for o in found.compensation if o.kept]) >= 12


def test_a_token_whose_embedding_is_zeros(gguf, tmp_path):
    """As of symbols that were added and never trained."""
    path = tmp_path / "zeros.gguf"
    shutil.copy(gguf(hidden_size=256, intermediate_size=512), path)
    file = GgufFile(path)
    with path.open("r+b") as f:
        f.seek(file.data_start + file.tensors["token_embd.weight"].offset + 7 * 512)
        f.write(bytes(512))
    tokens = np.random.default_rng(0).integers(3, 300, (CHUNKS, N_CTX)).astype(np.int32)
    tokens[:, ::5] = 7
    text = Chunks(tokens, (Used("ids", "0" * 64, None, 1, 1, tokens.size, CHUNKS),))
    imatrix = test_hessian.run(path, tmp_path / "im.gguf", text=lambda model: text).path
    found = quantize(path, tmp_path / "q.gguf", TYPE, imatrix=imatrix, rounding="sequential")
    assert all(np.isfinite(o.loss) for o in found.compensation)
