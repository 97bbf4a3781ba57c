"""Quantizing with compensated rounding: same types and bytes as plain, closer outputs, keys that tell of it."""

import json

import numpy as np
import pytest
import test_hessian
import tiny
from click.testing import CliRunner

from cnq.allocate.groups import Part
from cnq.allocate.rounding import Compensating, Plain
from cnq.allocate.scan import scan
from cnq.cli import cli
from cnq.engine.weights import PRODUCT
from cnq.errors import QuantizeError, StatisticsError
from cnq.gguf_file import TYPE_BY_NAME, GgufFile
from cnq.hessian_file import Statistics, beside, read_statistics
from cnq.imatrix_file import read_imatrix
from cnq.quantize import quantize

CHUNKS = 20


@pytest.fixture(scope="module")
def calibrated(wide_gguf, tmp_path_factory):
    """An importance matrix of the wide model with second moments beside it."""
    dst = tmp_path_factory.mktemp("calibrated") / "im.gguf"
    return test_hessian.calibrated(wide_gguf, dst, CHUNKS)


@pytest.fixture(scope="module")
def both(wide_gguf, calibrated, tmp_path_factory):
    """(plain, compensated) results of Q4_K_M."""
    folder = tmp_path_factory.mktemp("rounded")
    return tuple(
        quantize(wide_gguf, folder / f"{rounding}.gguf", "Q4_K_M", imatrix=calibrated, rounding=rounding, threads=1)
        for rounding in ("plain", "compensated")
    )


def data(path):
    file = GgufFile(path)
    return {name: (t.type.name, t.shape, file.tensor(name).data.tobytes()) for name, t in file.tensors.items()}


def test_types_and_bytes_stay_and_keys_tell_of_it(both, calibrated):
    plain, compensated = both
    one, two = data(plain.path), data(compensated.path)
    assert [(n, *t[:2], len(t[2])) for n, t in one.items()] == [(n, *t[:2], len(t[2])) for n, t in two.items()]
    fields, before = GgufFile(compensated.path).fields, GgufFile(plain.path).fields
    added = {key: fields[key] for key in fields.keys() - before.keys()}
    assert added == {
        "cnq.rounding.method": "compensated",
        "cnq.rounding.damping": added["cnq.rounding.damping"],
        "cnq.rounding.statistics": read_statistics(beside(calibrated)).digest,
    }
    assert all(float(share) > 0 for share in added["cnq.rounding.damping"].split(", "))
    assert {key: fields[key] for key in before} == before
    assert (plain.rounding, compensated.rounding) == ("plain", "compensated")


def test_codes_differ_just_where_compensation_was_kept(both):
    plain, compensated = both
    one, two = data(plain.path), data(compensated.path)
    changed = {name for name in one if one[name] != two[name]}
    assert changed == {o.name for o in compensated.compensation if o.kept}
    assert len(changed) >= 12  # of 14 matrices and the output
    assert f"compensated {len(changed)} of {len(compensated.compensation)} matrices" in compensated.notes


def test_no_matrix_is_worse_on_held_back_inputs(both, calibrated, wide_gguf):
    """The losses told are ‖E Zᵀ‖² / n with the sketch Z, recomputed here from the files by numpy."""
    statistics = read_statistics(beside(calibrated))
    files = [GgufFile(path) for path in (wide_gguf, *(b.path for b in both))]
    for o in both[1].compensation:
        sums = statistics.read(statistics.find(o.name))
        exact, plain, mine = (file.tensor(o.name).float32().astype(np.float64) for file in files)
        losses = [float(((e @ sums.held.T) ** 2).sum() / sums.n_held) for e in (plain - exact, mine - exact)]
        assert losses == pytest.approx([o.loss_plain, o.loss], rel=1e-3)
        assert losses[1] < losses[0] if o.kept else losses[1] == losses[0]


def test_trying_types_computes_the_factor_of_an_input_once(wide_gguf, calibrated, monkeypatch):
    """And takes the same errors from it, however many threads there are."""
    statistics, importance = read_statistics(beside(calibrated)), read_imatrix(calibrated).means()
    file, random = GgufFile(wide_gguf), np.random.default_rng(0)
    parts = [Part(f"blk.0.{role}.weight", PRODUCT) for role in ("attn_q", "ffn_down", "ffn_up")]
    inputs = {p.tensor: random.normal(size=(64, file.tensors[p.tensor].shape[1])).astype(np.float32) for p in parts}
    types = [TYPE_BY_NAME[name] for name in ("Q3_K", "Q4_K", "Q5_K", "Q6_K")]
    read, real = [], Statistics.read
    monkeypatch.setattr(Statistics, "read", lambda self, number: read.append(number) or real(self, number))

    def errors(threads: int):
        rounding = Compensating(Plain(importance), statistics, threads)
        return scan(file, dict.fromkeys(parts, types), inputs, np.zeros((1, 1), np.int32), rounding, 64, threads)

    several = errors(3)
    assert len(read) == len(set(read)) == 3
    assert several == errors(1)


def test_plain_is_what_it_was_without_statistics(both, wide_gguf, calibrated, tmp_path):
    alone = tmp_path / calibrated.name
    alone.write_bytes(calibrated.read_bytes())
    auto = quantize(wide_gguf, tmp_path / "a.gguf", "Q4_K_M", imatrix=alone)
    assert auto.rounding == "plain"
    assert auto.path.read_bytes() == both[0].path.read_bytes()


def test_statistics_beside_the_imatrix_are_used_unasked_and_threads_change_nothing(both, wide_gguf, calibrated, tmp_path):
    auto = quantize(wide_gguf, tmp_path / "q.gguf", "Q4_K_M", imatrix=calibrated, threads=3)
    assert auto.rounding == "compensated"
    assert auto.path.read_bytes() == both[1].path.read_bytes()


def test_types_whose_codes_stand_for_groups_stay_plain_by_name(wide_gguf, calibrated, tmp_path):
    plain, mine = (
        quantize(wide_gguf, tmp_path / f"{r}.gguf", "IQ3_S", imatrix=calibrated, rounding=r) for r in ("plain", "compensated")
    )
    fixed = {o.name for o in mine.compensation if o.reason}
    assert fixed
    assert {o.type for o in mine.compensation if o.reason} <= {"IQ3_S", "IQ3_XXS"}
    one, two = data(plain.path), data(mine.path)
    assert all(one[name] == two[name] for name in fixed)
    assert any("codes of this type stand for groups: blk." in note for note in mine.notes)


def test_experts_with_few_tokens_stay_plain_by_name(tmp_path):
    """Each expert by itself: those that saw enough tokens are compensated, the others are plain."""
    model = tiny.moe_gguf(tmp_path / "moe.gguf", experts=8, used=1)
    imatrix = test_hessian.calibrated(model, tmp_path / "im.gguf", 30)
    plain, mine = (
        quantize(model, tmp_path / f"{r}.gguf", "Q4_0", imatrix=imatrix, rounding=r) for r in ("plain", "compensated")
    )
    name = "blk.0.ffn_down_exps.weight"
    rows = {o.expert: o for o in mine.compensation if o.name == name}
    assert sorted(rows) == list(range(8))
    assert {bool(o.reason) for o in rows.values()} == {True, False}
    one, two = (GgufFile(r.path).tensor(name).data.reshape(8, -1) for r in (plain, mine))
    assert all((not np.array_equal(one[e], two[e])) == o.kept for e, o in rows.items())
    assert any(f"{name} expert" in note and "too few" in note for note in mine.notes)


@pytest.mark.parametrize("type", ["Q3_K_S", "IQ4_NL"])
def test_other_types_lose_less_too(type, wide_gguf, calibrated, tmp_path):
    found = quantize(wide_gguf, tmp_path / "q.gguf", type, imatrix=calibrated)
    tried = [o for o in found.compensation if o.type == type.removesuffix("_S").removesuffix("_M")]
    assert len(tried) > 3
    assert sum(o.loss for o in tried) < 0.95 * sum(o.loss_plain for o in tried)


def test_statistics_of_another_model_damaged_or_missing_are_refused(wide_gguf, gguf, calibrated, tmp_path):
    other = gguf(hidden_size=256, intermediate_size=512, rope_theta=5000.0)
    with pytest.raises(StatisticsError, match="another model"):
        quantize(other, tmp_path / "q.gguf", "Q4_K_M", imatrix=calibrated)
    assert quantize(other, tmp_path / "q.gguf", "Q4_K_M", imatrix=calibrated, rounding="plain").rounding == "plain"
    with pytest.raises(StatisticsError, match="no --imatrix was given"):
        quantize(wide_gguf, tmp_path / "x.gguf", "Q4_K_M", rounding="compensated")
    mine = tmp_path / calibrated.name
    mine.write_bytes(calibrated.read_bytes())
    with pytest.raises(StatisticsError, match="does not exist"):
        quantize(wide_gguf, tmp_path / "x.gguf", "Q4_K_M", imatrix=mine, rounding="compensated")
    with pytest.raises(QuantizeError, match="unknown rounding"):
        quantize(wide_gguf, tmp_path / "x.gguf", "Q4_K_M", rounding="up")
    beside(mine).mkdir()
    for part in beside(calibrated).iterdir():
        (beside(mine) / part.name).write_bytes(part.read_bytes())
    (beside(mine) / "00001.npy").write_bytes(b"\x93NUMPY nothing")
    with pytest.raises(QuantizeError, match=r"00001\.npy, the statistics of blk\.0"):
        quantize(wide_gguf, tmp_path / "x.gguf", "Q4_K_M", imatrix=mine)
    assert not (tmp_path / "x.gguf").exists()


def test_the_command(wide_gguf, calibrated, tmp_path):
    command = ["quantize", str(wide_gguf), str(tmp_path / "q.gguf"), "-t", "Q4_K_M", "--imatrix", str(calibrated), "--json"]
    result = CliRunner().invoke(cli, [*command, "--rounding", "compensated"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["rounding"] == "compensated"
    assert {o["name"] for o in found["compensation"]} >= {"blk.0.attn_q.weight", "output.weight"}
