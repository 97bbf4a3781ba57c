"""The importance matrix: llama-imatrix's numbers, resumed, merged, dense and with experts."""

import _thread
import json
import signal
import threading
import time
from pathlib import Path

import make_tools
import numpy as np
import pytest
import tiny
from click.testing import CliRunner

from cnq.cli import cli
from cnq.corpus import Source, chunks
from cnq.engine.model import Model
from cnq.errors import EngineError, GgufError
from cnq.gguf_file import GgufFile
from cnq.imatrix import STATE, Collector, collect
from cnq.imatrix_file import read_imatrix
from cnq.imatrix_stats import statistics
from cnq.quantize import quantize

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tools.json").read_text())["imatrix"]


def text(n_ctx=make_tools.N_CTX, n_chunks=make_tools.CHUNKS):
    source = Source("text.txt", "0" * 64, (make_tools.text(),))
    return lambda model: chunks([source], lambda t: model.tokenize(t, add_special=True, parse_special=False), n_ctx, n_chunks)


def run(gguf, dst, **options):
    settings = {"n_ctx": make_tools.N_CTX, "force": True} | options
    return collect(gguf, settings.pop("text", text()), dst, **settings)


@pytest.fixture(scope="module")
def f16(gguf):
    return gguf()


def worst(one, other) -> float:
    return max(float((np.abs(one[n] - other[n]) / np.maximum(np.abs(other[n]), 1e-20)).max()) for n in other)


def test_sums_and_counts_are_those_of_llama_imatrix(f16, tmp_path):
    """To 1e-4; the float32 sums of the reference differ by the order of their additions."""
    run(f16, tmp_path / "im.gguf")
    importance = read_imatrix(tmp_path / "im.gguf")
    assert importance.sums.keys() == GOLDEN.keys()
    assert worst(importance.sums, {n: np.array(g["sums"])[None] for n, g in GOLDEN.items()}) < 1e-4
    assert all(importance.counts[n].tolist() == g["counts"] for n, g in GOLDEN.items())
    assert (importance.n_chunks, importance.chunk_size) == (make_tools.CHUNKS, make_tools.N_CTX)


def test_a_batch_smaller_than_a_chunk_gives_the_same_sums(f16, tmp_path):
    run(f16, tmp_path / "a.gguf")
    run(f16, tmp_path / "b.gguf", n_batch=32)
    assert (
        worst(read_imatrix(tmp_path / "b.gguf").sums, read_imatrix(tmp_path / "a.gguf").sums) < 5e-3
    )  # other shapes, other rounding


@pytest.mark.parametrize("dtype", ["bf16", "q8_0"])
def test_other_float_types_give_nearly_the_same(dtype, gguf, f16, tmp_path):
    run(f16, tmp_path / "a.gguf")
    run(gguf(dtype=dtype), tmp_path / "b.gguf")
    a, b = (read_imatrix(tmp_path / f"{n}.gguf").sums for n in "ab")
    assert all(np.allclose(a[n].sum(), b[n].sum(), rtol=0.05) for n in a)


def test_the_sums_are_the_squares_of_the_inputs(f16, tmp_path):
    """Against ten lines of numpy: the first layer's input is the normed embedding."""
    run(f16, tmp_path / "im.gguf")
    file = GgufFile(f16)
    with Model(f16, n_ctx=64) as model:
        made = text()(model).tokens.copy()
        made[:, 0] = file.fields["tokenizer.ggml.bos_token_id"]
    x = file.tensor("token_embd.weight").float32()[made.ravel()].astype(np.float64)
    x /= np.sqrt((x**2).mean(1, keepdims=True) + 1e-5)
    x *= file.tensor("blk.0.attn_norm.weight").float32()
    importance = read_imatrix(tmp_path / "im.gguf")
    assert np.allclose(importance.sums["blk.0.attn_q.weight"][0], (x**2).sum(0), rtol=1e-4)
    assert np.allclose(importance.inputs["blk.0.attn_q.weight"][0], x.sum(0), atol=1e-3)


def test_a_pass_ends_after_the_last_matrix_asked_for(f16):
    """The output head is not computed; with process_output it is."""
    for process_output in (False, True):
        collector = Collector(GgufFile(f16), process_output)
        shown = []

        def watch(tensor, ask, collector=collector, shown=shown):
            more = collector(tensor, ask)
            if not ask:
                shown.append((tensor.src[0].contents.name.decode(), more))
            return more

        with Model(f16, n_ctx=64, n_batch=64, watch=watch) as model:
            for _ in range(2):
                collector.begin()
                shown.clear()
                model.feed([5] * 64)
        assert [name for name, more in shown if not more] == ["output.weight" if process_output else "blk.1.ffn_down.weight"]
        assert ("output.weight" in collector.sums) == process_output


def test_ctrl_c_is_not_lost_in_native_code(f16):
    """It mostly comes while llama.cpp calls back, where Python's own exception would be dropped."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with Model(f16, n_ctx=64, n_batch=64, n_threads=1, watch=lambda tensor, ask: True) as model:
            for _ in range(5):
                with pytest.raises(KeyboardInterrupt):
                    threading.Timer(0.02, _thread.interrupt_main).start()
                    until = time.monotonic() + 2
                    while time.monotonic() < until:
                        model.feed([5] * 64)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupted_run_goes_on_and_ends_in_the_same_file(f16, tmp_path):
    run(f16, tmp_path / "whole.gguf", save_every=2)
    dst = tmp_path / "im.gguf"

    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(f16, dst, save_every=2, progress=stop)
    assert not dst.exists()
    assert dst.with_name(dst.name + STATE).exists()
    assert run(f16, dst, save_every=2).resumed == 4
    assert dst.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["im.gguf", "whole.gguf"]


def test_a_state_of_another_run_is_not_gone_on_with(f16, tmp_path):
    dst = tmp_path / "im.gguf"
    with pytest.raises(KeyboardInterrupt):
        run(
            f16, dst, save_every=2, progress=lambda done, total: (_ for _ in ()).throw(KeyboardInterrupt) if done == 4 else None
        )
    assert run(f16, dst, text=text(n_chunks=5)).resumed == 0
    dst.with_name(dst.name + STATE).write_bytes(b"damaged")
    assert run(f16, dst).resumed == 0


def test_merging_adds(f16, tmp_path):
    run(f16, tmp_path / "a.gguf")
    run(f16, tmp_path / "b.gguf", merge=(tmp_path / "a.gguf",))
    a, b = read_imatrix(tmp_path / "a.gguf"), read_imatrix(tmp_path / "b.gguf")
    assert b.n_chunks == 2 * a.n_chunks
    assert all(np.array_equal(b.sums[n], 2 * a.sums[n]) and np.array_equal(b.counts[n], 2 * a.counts[n]) for n in a.sums)


def test_merging_another_model_is_refused(f16, wide_gguf, tmp_path):
    run(wide_gguf, tmp_path / "other.gguf")
    with pytest.raises(GgufError, match="other models"):
        run(f16, tmp_path / "im.gguf", merge=(tmp_path / "other.gguf",))
    assert not (tmp_path / "im.gguf").exists()


def test_both_forms_quantize_alike(wide_gguf, tmp_path):
    run(wide_gguf, tmp_path / "im.gguf")
    run(wide_gguf, tmp_path / "im.dat", legacy=True)
    one = GgufFile(quantize(wide_gguf, tmp_path / "a.gguf", "Q4_K_M", imatrix=tmp_path / "im.gguf").path)
    two = GgufFile(quantize(wide_gguf, tmp_path / "b.gguf", "Q4_K_M", imatrix=tmp_path / "im.dat").path)
    unlike = [n for n in one.tensors if one.tensor(n).data.tobytes() != two.tensor(n).data.tobytes()]
    assert len(unlike) <= len(one.tensors) // 4  # the .dat holds mean * passes: the last bit may differ


def test_experts_are_counted_one_by_one(tmp_path):
    """Each token goes to 2 of 4 experts; each expert's sums are those of the tokens routed to it."""
    model = tiny.moe_gguf(tmp_path / "moe.gguf")
    ids = np.random.default_rng(0).integers(3, 32, (3, 64))
    made = chunks([Source("ids", "0" * 64, ("x",))], lambda t: ids.ravel().tolist(), 64, None)
    found = run(model, tmp_path / "im.gguf", text=lambda m: made)
    importance = read_imatrix(tmp_path / "im.gguf")
    name = "blk.0.ffn_up_exps.weight"
    counts = importance.counts[name]
    assert counts.sum() == 2 * ids.size
    assert importance.sums[name].shape == importance.inputs[name].shape == (4, 64)
    assert np.allclose(importance.inputs[name].sum(0), 2 * importance.inputs["blk.0.ffn_gate_inp.weight"][0], atol=1e-3)
    assert np.array_equal(counts, importance.counts["blk.0.ffn_down_exps.weight"])
    # every token's input, counted once for each of its two experts, is the dense input of the router
    router = importance.sums["blk.0.ffn_gate_inp.weight"][0]
    assert np.allclose(importance.sums[name].sum(0), 2 * router, rtol=1e-4)
    assert not found.notes


def test_an_expert_without_tokens_is_named(tmp_path):
    model = tiny.moe_gguf(tmp_path / "moe.gguf", experts=32, used=1)
    made = chunks([Source("ids", "0" * 64, ("x",))], lambda t: [5] * 128, 64, None)
    found = run(model, tmp_path / "im.gguf", text=lambda m: made)
    assert any("blk.0.ffn_up_exps.weight: no token was routed to experts" in note for note in found.notes)


def test_an_error_in_the_callback_comes_out(f16):
    def watch(tensor, ask):
        raise EngineError("boom")

    with Model(f16, n_ctx=64, watch=watch) as model, pytest.raises(EngineError, match="boom"):
        model.feed([5] * 32)


def test_statistics_follow_their_definitions(f16, tmp_path):
    run(f16, tmp_path / "im.gguf")
    importance = read_imatrix(tmp_path / "im.gguf")
    found = {s.name: s for s in statistics(importance)}
    mean = importance.means()["blk.1.attn_q.weight"].astype(np.float64)
    s = found["blk.1.attn_q.weight"]
    assert (s.n, s.total, s.most) == (64, pytest.approx(mean.sum()), pytest.approx(mean.max()))
    assert s.entropy == pytest.approx(-(mean / mean.sum() * np.log2(mean / mean.sum())).sum())
    assert found["blk.0.attn_q.weight"].cosine == 0
    assert 0 < s.cosine <= 1


def test_inspect_shows_the_statistics(f16, tmp_path):
    run(f16, tmp_path / "im.gguf")
    run(f16, tmp_path / "im.dat", legacy=True)
    for path in (tmp_path / "im.gguf", tmp_path / "im.dat"):
        shown = CliRunner().invoke(cli, ["inspect", str(path)])
        assert shown.exit_code == 0, shown.output
        assert "blk.1.ffn_down " in shown.output
        rows = json.loads(CliRunner().invoke(cli, ["inspect", str(path), "--json"]).stdout)
        assert len(rows) == 14


def test_the_command(f16, tmp_path):
    (tmp_path / "text.txt").write_text(make_tools.text())
    arguments = [
        "imatrix",
        str(f16),
        str(tmp_path / "text.txt"),
        "-o",
        str(tmp_path / "im.gguf"),
        "--ctx",
        "64",
        "--chunks",
        "4",
    ]
    result = CliRunner().invoke(cli, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["n_entries"] == 14
    again = CliRunner().invoke(cli, arguments)
    assert again.exit_code == 1
    assert "--force" in again.output
