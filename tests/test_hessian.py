"""Second moments of matrix inputs: numpy's, whatever the slices, resumed, refused when damaged or another model's."""

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny
from click.testing import CliRunner

from cnq import imatrix
from cnq.cli import cli
from cnq.corpus import Chunks, Used
from cnq.engine import ggml
from cnq.engine.model import Model
from cnq.errors import NoSpace, StatisticsError
from cnq.gguf_file import GgufFile
from cnq.hessian import HELD_EVERY, signs
from cnq.hessian_file import add_outer, beside, complete_statistics, packed_size, read_statistics, unpacked
from cnq.imatrix import collect, with_bos
from cnq.imatrix_file import read_imatrix

N_CTX, N_CHUNKS = 64, 6


def text(gguf, seed=0, n=N_CHUNKS):
    vocab = GgufFile(gguf).tensors["token_embd.weight"].shape[0]
    tokens = np.random.default_rng(seed).integers(3, vocab, (n, N_CTX)).astype(np.int32)
    return lambda model: Chunks(tokens, (Used("ids", "0" * 64, None, 1, 1, tokens.size, n),))


def run(gguf, dst, **options):
    settings = {"n_ctx": N_CTX, "force": True, "hessian": True, "text": text(gguf)} | options
    return collect(gguf, settings.pop("text"), dst, **settings)


def calibrated(gguf, dst, n):
    """An importance matrix of so many chunks, with second moments beside it."""
    return run(gguf, dst, text=text(gguf, n=n)).path


def content(dst):
    return {p.name: p.read_bytes() for p in sorted(beside(dst).iterdir())}


def expected(gguf) -> dict:
    """(weight, expert) -> [Σ x xᵀ over the chunks to fit to, Σ s xᵀ over those held back] in float64, and the rows of each."""
    found: dict = {}
    held, drawn = 0, signs(0, N_CTX)

    def watch(tensor, ask):
        if tensor.op not in (ggml.op("MUL_MAT"), ggml.op("MUL_MAT_ID")):
            return not ask
        if ask:
            return True
        weight = tensor.src[0].contents
        name, x = weight.name.decode(), ggml.array(tensor.src[1].contents).astype(np.float64)
        if tensor.op == ggml.op("MUL_MAT"):
            rows = {None: (np.arange(N_CTX), x.reshape(-1, x.shape[-1]))}
        else:
            chosen = ggml.array(tensor.src[2].contents, np.int32)[0, 0]
            x = np.broadcast_to(x[0], (*chosen.shape, x.shape[-1]))
            rows = {e: (np.nonzero(chosen == e)[0], x[chosen == e]) for e in range(weight.ne[2])}
        for expert, (token, part) in rows.items():
            sums = found.setdefault((name, expert), [[0, 0], [0, 0]])
            sums[0][held] = sums[0][held] + (drawn[token].T if held else part.T) @ part
            sums[1][held] += len(part)
        return True

    with Model(gguf, n_ctx=N_CTX, n_batch=N_CTX, watch=watch) as model:
        for i, tokens in enumerate(text(gguf)(model).tokens):
            held, drawn = int(i % HELD_EVERY == HELD_EVERY - 1), signs(i, N_CTX)
            model.feed(with_bos(model, tokens))
    return found


def agree(statistics, reference) -> None:
    for one in statistics.inputs:
        for weight in one.weights:
            found = statistics.read(statistics.find(weight, one.expert))
            sums, rows = reference[weight, one.expert]
            assert (found.n_fit, found.n_held) == tuple(rows)
            for mine, theirs in zip((found.fit, found.held), sums, strict=True):
                assert np.abs(mine - theirs).max() <= 2e-6 * max(1, np.abs(theirs).max()), weight
            assert np.array_equal(found.fit, found.fit.T)


@pytest.mark.parametrize("tied", [False, True])
def test_the_moments_are_numpys(tied, gguf, tmp_path):
    """Of all seven matrices of both layers and the output; of the embedding where it is the output."""
    model = gguf(hidden_size=256, intermediate_size=320, tie_word_embeddings=tied)
    found = run(model, tmp_path / "im.gguf")
    statistics = read_statistics(found.hessian)
    groups = [one.weights for one in statistics.inputs]
    assert sorted(map(len, groups)) == [1, 1, 1, 1, 1, 2, 2, 3, 3]
    assert groups[-1] == ("token_embd.weight" if tied else "output.weight",)
    assert not statistics.missing
    agree(statistics, expected(model))


def test_each_expert_has_its_own(tmp_path):
    model = tiny.moe_gguf(tmp_path / "moe.gguf")
    found = run(model, tmp_path / "im.gguf")
    statistics = read_statistics(found.hessian)
    assert statistics.find("blk.0.ffn_up_exps.weight", 2) == statistics.find("blk.0.ffn_gate_exps.weight", 2)
    assert statistics.find("blk.0.ffn_gate_inp.weight") is None  # the router stays as it is
    agree(statistics, expected(model))


def test_the_diagonal_is_the_importance_matrix(wide_gguf, tmp_path):
    """The same pass gives both, and the importance matrix is the same with and without. Nothing held back: 4 chunks."""
    with_it = run(wide_gguf, tmp_path / "im.gguf", text=text(wide_gguf, n=4))
    without = run(wide_gguf, tmp_path / "plain.gguf", text=text(wide_gguf, n=4), hessian=False)
    assert with_it.path.read_bytes() == without.path.read_bytes()
    assert not beside(without.path).exists()
    importance = read_imatrix(with_it.path)
    statistics = read_statistics(with_it.hessian)
    for name, sums in importance.sums.items():
        found = statistics.read(statistics.find(name))
        assert np.allclose(found.fit.diagonal(), sums[0], rtol=1e-4), name


def test_slices_give_the_same_bytes_as_one_pass(wide_gguf, tmp_path):
    whole = run(wide_gguf, tmp_path / "im.gguf")
    before = content(whole.path)
    memory = max(one.nbytes for one in read_statistics(whole.hessian).inputs)
    for path in beside(whole.path).iterdir():
        path.unlink()
    sliced = run(wide_gguf, whole.path, hessian_memory=memory, threads=1)
    assert (whole.passes, sliced.passes) == (1, 7)
    assert content(whole.path) == before


def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(wide_gguf, tmp_path):
    one, dst = tmp_path / "one" / "im.gguf", tmp_path / "im.gguf"
    run(wide_gguf, one)
    options = {"hessian_memory": 3_000_000, "save_every": 2}

    def stop(done, total):
        if done == 2 * N_CHUNKS + 3:  # in the third pass
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(wide_gguf, dst, progress=stop, **options)
    assert not dst.exists()
    begun = read_statistics(beside(dst))
    assert 0 < len(begun.missing) < len(begun.inputs)
    ticks = []
    again = run(wide_gguf, dst, progress=lambda done, total: ticks.append(done), **options)
    assert again.resumed == N_CHUNKS
    assert len(ticks) < again.passes * N_CHUNKS + 1
    assert content(dst) == content(one)
    assert dst.read_bytes() == one.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["im.gguf", "im.gguf.hessian", "one"]


def test_another_text_or_model_begins_anew(wide_gguf, gguf, tmp_path):
    dst = tmp_path / "im.gguf"
    run(wide_gguf, dst)
    before = content(dst)
    run(wide_gguf, dst, text=text(wide_gguf, seed=1))
    assert content(dst).keys() == before.keys()
    assert content(dst)["00000.npy"] != before["00000.npy"]
    run(gguf(), dst)
    assert {one.columns for one in read_statistics(beside(dst)).inputs} == {64, 96}


def test_what_is_of_another_model_incomplete_or_damaged_is_refused(wide_gguf, tmp_path):
    dst = tmp_path / "im.gguf"
    run(wide_gguf, dst)
    folder = beside(dst)
    mine = read_statistics(folder)
    assert complete_statistics(folder, mine.source.model).digest == mine.digest
    with pytest.raises(StatisticsError, match="another model"):
        complete_statistics(folder, "0" * 64)
    damaged = mine.path(3)
    whole = damaged.read_bytes()
    for content, reason in (
        (whole[:1000], "cannot be read"),
        (whole[:-4] + b"\1\2\3\4", "checksum"),
        (b"", "cannot be read"),
    ):
        damaged.write_bytes(content)
        with pytest.raises(StatisticsError, match=reason) as refused:
            mine.read(3)
        assert "00003.npy" in str(refused.value)
        assert mine.inputs[3].name in str(refused.value)
    manifest = folder / "manifest.json"
    known = json.loads(manifest.read_text())
    known["inputs"][2]["n_fit"] = None
    manifest.write_text(json.dumps(known))
    with pytest.raises(StatisticsError, match="not complete: 1 of 9"):
        complete_statistics(folder, mine.source.model)
    for broken in ("{", "[]", json.dumps(known | {"format": 2}), json.dumps(known | {"inputs": [{"weights": []}]})):
        manifest.write_text(broken)
        with pytest.raises(StatisticsError, match="damaged"):
            read_statistics(folder)
    with pytest.raises(StatisticsError, match="cannot be read"):
        read_statistics(tmp_path / "none")


def test_too_little_memory_or_disk_is_said_before_the_work(wide_gguf, tmp_path, monkeypatch):
    with pytest.raises(NoSpace, match="memory needed for the statistics of blk"):
        run(wide_gguf, tmp_path / "im.gguf", hessian_memory=100_000)
    monkeypatch.setattr("cnq.hessian.shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1_000_000}))
    with pytest.raises(NoSpace, match="of disk needed for second moments"):
        run(wide_gguf, tmp_path / "other.gguf")
    assert not (tmp_path / "other.gguf").exists()


def test_threads_change_nothing(wide_gguf, tmp_path):
    for threads in (1, 2):
        run(wide_gguf, tmp_path / f"{threads}.gguf", threads=threads)
    assert content(tmp_path / "1.gguf") == content(tmp_path / "2.gguf")


def test_the_sketch_tells_what_an_error_costs_on_the_rows_held_back(wide_gguf, tmp_path):
    """Within the 6 % that 512 signs promise for one error, three of them at most, and closer for a matrix of errors."""
    found = run(wide_gguf, tmp_path / "im.gguf")
    statistics = read_statistics(found.hessian)
    number = statistics.find("blk.1.ffn_down.weight")
    held = statistics.read(number).held
    rows = []

    def watch(tensor, ask):
        if tensor.op != ggml.op("MUL_MAT") or tensor.src[0].contents.name != b"blk.1.ffn_down.weight":
            return not ask
        if not ask:
            rows.append(ggml.array(tensor.src[1].contents)[0, 0].copy())
        return True

    with Model(wide_gguf, n_ctx=N_CTX, n_batch=N_CTX, watch=watch) as model:
        model.feed(with_bos(model, text(wide_gguf)(model).tokens[HELD_EVERY - 1]))
    (x,) = rows
    errors = np.random.default_rng(0).standard_normal((200, x.shape[1])).astype(np.float32)
    exact, told = (((errors @ part.T) ** 2).sum(1) for part in (x, held))
    assert np.abs(told / exact - 1).max() < 0.25
    assert told.sum() == pytest.approx(exact.sum(), rel=0.03)


def test_packing_keeps_a_symmetric_matrix():
    x = np.random.default_rng(0).standard_normal((40, 600)).astype(np.float32)
    packed = np.zeros(packed_size(600), np.float32)
    with ThreadPoolExecutor(2) as pool:
        add_outer(packed, x[:15], pool)
        add_outer(packed, x[15:], pool)
    assert packed_size(600) == 256 * 600 + 256 * 344 + 88 * 88
    assert np.allclose(unpacked(packed, 600), x.T @ x, atol=1e-4)


def test_the_command(wide_gguf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("人工智能 quick brown fox。" * 200)
    command = ["imatrix", str(wide_gguf), "text.txt", "-o", "im.gguf", "--ctx", "64", "--chunks", "4", "--hessian", "--json"]
    result = CliRunner().invoke(cli, [*command, "--hessian-memory", "50MB"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["hessian"] == "im.gguf.hessian"
    assert not read_statistics(tmp_path / "im.gguf.hessian").missing
    assert imatrix.STATE not in "".join(p.name for p in tmp_path.iterdir())


def test_killed_between_slices_the_next_run_ends_in_the_same_bytes(wide_gguf, tmp_path):
    (tmp_path / "text.txt").write_text("人工智能 quick brown fox。" * 400)

    def command(name):
        return [sys.executable, "-m", "cnq", "imatrix", str(wide_gguf), str(tmp_path / "text.txt"), "-o", str(tmp_path / name),
                "--ctx", "64", "--chunks", "10", "--hessian", "--hessian-memory", "3MB"]  # fmt: skip

    subprocess.run(command("whole.gguf"), check=True, capture_output=True)
    dst = tmp_path / "im.gguf"
    child = subprocess.Popen(command("im.gguf"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while child.poll() is None and not (beside(dst) / "00000.npy").exists():
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not dst.exists()
    subprocess.run(command("im.gguf"), check=True, capture_output=True)
    assert content(dst) == content(tmp_path / "whole.gguf")
    assert dst.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
