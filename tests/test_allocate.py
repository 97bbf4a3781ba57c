"""A size budget: exact bytes for every shape, the same answer twice, clear limits, recipes that make the same file again."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from test_quantize import write_imatrix

from cnq.allocate import measure as measuring
from cnq.allocate.candidates import USUAL, allowed_types, space
from cnq.allocate.gains import Prober, by_part, gains
from cnq.allocate.groups import Part, grouped, parts
from cnq.allocate.measure import CACHE, EFFORTS, Sensitivities, text_of
from cnq.allocate.recipe import Recipe, applied, read_recipe, write_recipe
from cnq.allocate.rounding import Plain
from cnq.allocate.scan import Error, scan
from cnq.allocate.search import Budget, allocate, repacked_here
from cnq.cli import cli
from cnq.corpus import Source
from cnq.engine import rows
from cnq.engine.weights import LOOKUP, PRODUCT
from cnq.errors import QuantizeError
from cnq.files import sha256
from cnq.gguf_file import TYPE_BY_NAME, GgufFile
from cnq.machine import instructions
from cnq.quantize import anchored, plan, quantize
from cnq.scores import Estimate
from cnq.terminal import Progress

TEXT = text_of([Source("sentences", "0", tuple(tiny.SENTENCES * 30))], 0)
QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def model(gguf, tmp_path_factory):
    """A wide model that no other test writes beside."""
    folder = tmp_path_factory.mktemp("allocate")
    src = folder / "wide-F16.gguf"
    src.write_bytes(gguf(hidden_size=256, intermediate_size=512, tie_word_embeddings=True).read_bytes())
    return src, write_imatrix(src, folder / "im.gguf")


@pytest.fixture(scope="module")
def found(model):
    return at(model, 4.5)


def at(model, bits, **options):
    src, imatrix = model
    return allocate(src, Budget(bits=bits), TEXT, imatrix=imatrix, effort="fast", threads=1, progress=QUIET, **options)


def quantized(src):
    return [t.name for t in plan(src, "Q4_K_M").tensors if t.type != t.from_type or t.wanted]


# Bytes


@pytest.mark.parametrize(
    "shape", [{"hidden_size": 96, "intermediate_size": 160}, {"hidden_size": 256, "intermediate_size": 352}]
)
def test_bytes_are_those_of_the_file(gguf, tmp_path, shape):
    """Rows of 64, 96, 160, 352: no block of 256 divides them. Each tensor in every type that it may have, then made."""
    src = gguf(**shape)
    file = GgufFile(src)
    room = space(file, plan(src, "Q4_K_M"), ("Q4_K", "Q6_K", "IQ4_XS"), frozenset())
    assert all(len(types) > 1 for types in room.candidates.values())
    usual = space(file, plan(src, "Q4_K_M"), allowed_types((), 1 << 40, file), frozenset())
    assert min(t.bits for types in usual.candidates.values() for t in types) <= 4.5, "Q8_0 alone fits odd rows"
    rounds = max(map(len, room.candidates.values()))
    for i in range(rounds):
        types = {name: row[(i + n) % len(row)].name for n, (name, row) in enumerate(room.candidates.items())}
        made = quantize(src, tmp_path / "made.gguf", "Q4_K_M", tensor_types=anchored(types), force=True)
        assert made.path.stat().st_size == made.nbytes == room.total(types)
        assert {n: t.type.name for n, t in GgufFile(made.path).tensors.items() if n in types} == types


@pytest.mark.parametrize(
    "name", [n for n in TYPE_BY_NAME if n not in ("F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K", "NVFP4")]
)
def test_bytes_of_every_type_are_those_of_the_dry_run(model, name):
    src, imatrix = model
    file = GgufFile(src)
    blocks = [n for n in quantized(src) if n.startswith("blk.")]
    room = space(file, plan(src, "Q4_K_M", imatrix=imatrix), ("Q4_K", name), frozenset(blocks))
    types = {n: name if n in blocks else "Q4_K" for n in room.candidates}
    assert plan(src, "Q4_K_M", imatrix=imatrix, tensor_types=anchored(types)).nbytes == room.total(types)


@pytest.mark.parametrize("bits", [3.7, 4.5, 6.0])
def test_the_file_fills_the_budget_and_never_exceeds_it(model, bits):
    found = at(model, bits)
    assert 0.995 * found.budget <= found.nbytes <= found.budget
    assert found.bits_per_weight <= bits
    assert found.gap < 1e-4
    assert found.predicted_stock is None or found.predicted < found.predicted_stock


def test_a_budget_out_of_reach_is_refused_with_both_limits(model, found):
    least, most = found.limits
    for nbytes in (least - 1, most + 1):
        with pytest.raises(QuantizeError, match=f"from {least} .* to {most} "):
            allocate(model[0], Budget(nbytes), TEXT, imatrix=model[1], effort="fast", types=USUAL, progress=QUIET)
    for nbytes in (least, most):
        exact = allocate(model[0], Budget(nbytes), TEXT, imatrix=model[1], effort="fast", types=USUAL, progress=QUIET)
        assert exact.nbytes == nbytes


def test_unlimited_memory_takes_the_largest_file(model, found):
    assert allocate(
        model[0], Budget(1 << 40, clipped=True), TEXT, imatrix=model[1], effort="fast", progress=QUIET
    ).nbytes == found.limits[1]  # fmt: skip


def test_only_types_that_were_named_are_used(model):
    found = at(model, 5.0, types=("q4_k", "Q6_K"))
    assert set(found.types.values()) == {"Q4_K", "Q6_K"}
    with pytest.raises(QuantizeError, match="Q4_L"):
        at(model, 5.0, types=("Q4_L",))


def test_tensors_may_be_left_no_choice(model):
    found = at(model, 5.0, tensor_types=((r"^token_embd\.", "Q6_K"), ("attn_v|token_embd", "Q5_K")))
    assert found.types["token_embd.weight"] == "Q6_K"
    assert {t for n, t in found.types.items() if "attn_v" in n} == {"Q5_K"}
    assert 0.995 * found.budget <= found.nbytes <= found.budget
    with pytest.raises(QuantizeError, match="no such tensor"):
        at(model, 5.0, tensor_types=(("attn_w", "Q5_K"),))


def test_coarse_types_are_for_small_sizes(model):
    file = GgufFile(model[0])
    assert "IQ3_S" in allowed_types((), int(3.2 * file.n_params / 8), file)
    assert "IQ3_S" not in allowed_types((), int(4.5 * file.n_params / 8), file)
    room = space(file, plan(model[0], "Q4_K_M"), ("IQ3_XXS", "Q3_K"), frozenset())
    assert all(TYPE_BY_NAME["IQ3_XXS"] not in types for types in room.candidates.values()), "it needs importance data"


def test_repacked_types_are_preferred(model, found):
    fast = at(model, 4.5, repacked=frozenset({"Q4_K", "Q2_K"}))
    count = [sum(t in ("Q4_K", "Q2_K") for t in a.types.values()) for a in (found, fast)]
    assert count[1] >= count[0]
    assert fast.nbytes <= fast.budget


def test_what_llama_cpp_repacks_is_asked_of_ggml():
    """Which these are is the processor's; a type that nothing rearranges on any is none of them."""
    assert repacked_here() <= {"Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q2_K", "IQ4_NL", "MXFP4", "Q8_0", "Q1_0"}
    flags = instructions() or ()
    if "AVX2" in flags:
        assert {"Q4_0", "Q4_K", "IQ4_NL"} <= repacked_here()


# Measuring


def test_a_second_budget_measures_nothing(model, found, monkeypatch):
    monkeypatch.setattr(measuring, "Prober", None)
    again = at(model, 4.5)
    assert (again.types, again.nbytes, again.predicted) == (found.types, found.nbytes, found.predicted)
    assert at(model, 5.5).nbytes > found.nbytes


def test_measuring_again_gives_the_same(model, found):
    cache = model[0].with_name("wide-F16" + CACHE)
    before = cache.read_text()
    cache.write_text("{")
    again = at(model, 4.5)
    assert again.types == found.types
    (one,), (two,) = (
        json.loads(t).values() for t in (cache.read_text(), json.dumps(dict([next(iter(json.loads(before).items()))])))
    )
    assert one["klds"] == two["klds"]


def test_weights_are_overwritten_in_place_and_restored(model, tmp_path):
    """A group's divergence in memory is that of a file with the rounded values, and nothing is left behind."""
    src, _ = model
    file = GgufFile(src)
    names = quantized(src)
    plain = Plain({})
    q8 = TYPE_BY_NAME["Q8_0"]
    with Prober(src, lambda m: TEXT.cut(m, 2), names, tmp_path, 1, 512) as prober:
        prober.read(16, lambda done, total: None)
        assert prober.uses("token_embd.weight") == {LOOKUP, PRODUCT}
        nothing = prober.kld({}, plain, 2)
        assert nothing.value == pytest.approx(0, abs=1e-6)
        blocks = {Part(n, PRODUCT): TYPE_BY_NAME["Q2_K"] for n in names if n.startswith("blk.")}
        assert prober.kld(blocks, plain, 2).value > 1e-3
        assert prober.kld({}, plain, 2) == nothing, "weights were not restored"
        ends = [Part("token_embd.weight", use) for use in (LOOKUP, PRODUCT)]
        apart = [prober.kld({end: TYPE_BY_NAME["Q2_K"]}, plain, 2).value for end in ends]
        both = prober.kld(dict.fromkeys(ends, TYPE_BY_NAME["Q2_K"]), plain, 2).value
        assert min(apart) > 0
        assert both == pytest.approx(sum(apart), rel=0.3), "the two uses of tied embeddings add up"
        assert prober.kld({}, plain, 2) == nothing
        stored = prober.rounded("blk.0.ffn_down.weight", q8, plain)
    tensor = file.tensor("blk.0.ffn_down.weight")
    values = tensor.data.astype(np.float32)
    codes = rows.encode(values, q8, None, np.empty(len(values) * q8.row_bytes(512), np.uint8)).reshape(len(values), -1)
    want = rows.decode(codes, q8, np.empty(values.size, np.float32)).astype(np.float16)
    assert (stored.view(np.float16) == want).all()


def test_errors_are_those_of_the_outputs(model):
    """With all rows and all inputs: the mean square of W x̂ computed the long way."""
    src, _ = model
    file = GgufFile(src)
    name, type = "blk.1.attn_q.weight", TYPE_BY_NAME["Q4_K"]
    x = np.random.default_rng(0).standard_normal((50, 256), dtype=np.float32)
    part = Part(name, PRODUCT)
    found = scan(file, {part: [type]}, {name: x}, np.zeros((1, 1), np.int32), Plain({}), 10_000, 1)[part]["Q4_K"]
    values = file.tensor(name).data.astype(np.float32)
    near = rows.decode(
        rows.encode(values, type, None, np.empty(values.size, np.uint8)).reshape(len(values), -1),
        type,
        np.empty(values.size, np.float32),
    )
    power = np.square(x @ values.T).sum()
    assert found.weight == pytest.approx(np.square(x @ (near - values).T).sum() / power, rel=1e-4)
    scale = np.abs(x).max(1, keepdims=True) / 127
    coarse = np.rint(x / scale) * scale  # block_q8_K: one scale for 256 numbers
    assert found.output == pytest.approx(np.square(coarse @ near.T - x @ values.T).sum() / power, rel=0.02)
    assert np.abs(rows.rounded_inputs(x, type) - coarse).max() <= scale.max() * 1.01


# The model of the loss


def test_gains_are_drawn_toward_their_role_by_their_noise():
    groups = ("ffn_up first", "ffn_up middle", "ffn_up last")
    sure = gains({g: Estimate(v, 0.001 * v) for g, v in zip(groups, (1.0, 2.0, 4.0), strict=True)}, dict.fromkeys(groups, 1.0))
    assert [sure[g].value for g in groups] == pytest.approx([1, 2, 4], rel=0.01), "measured well, they stay"
    noisy = gains({g: Estimate(v, v) for g, v in zip(groups, (1.0, 1.1, 0.9), strict=True)}, dict.fromkeys(groups, 1.0))
    assert np.ptp([noisy[g].value for g in groups]) < 1e-9, "measured badly, they are their mean"
    assert gains({"output": Estimate(0.5, 0.4)}, {"output": 2.0})["output"].value == pytest.approx(0.25)


def test_each_third_keeps_its_divergence_when_gains_follow_the_depth():
    names = [f"blk.{i}.ffn_up.weight" for i in range(9)]
    groups = {
        f"ffn_up {third}": [Part(n, PRODUCT) for n in names[3 * k : 3 * k + 3]]
        for k, third in enumerate(("first", "middle", "last"))
    }
    measured = {g: Estimate(10.0**-k, 0.0) for k, g in enumerate(groups)}
    errors = {p: 1.0 + i for i, p in enumerate(p for ps in groups.values() for p in ps)}
    totals = {g: sum(errors[p] for p in ps) for g, ps in groups.items()}
    own = gains(measured, totals)
    found = by_part(own, groups, errors, {})
    for g, ps in groups.items():
        assert sum(found[p] * errors[p] for p in ps) == pytest.approx(measured[g].value)
    values = [found[Part(n, PRODUCT)] for n in names]
    assert values == sorted(values, reverse=True)
    layers = {i: Estimate(1.0 + i % 3, 0.1) for i in range(9)}  # of several roles together; only the proportions count
    fitted = by_part(own, groups, errors, layers)
    for g, ps in groups.items():
        assert sum(fitted[p] * errors[p] for p in ps) == pytest.approx(measured[g].value)
        losses = [fitted[p] * errors[p] for p in ps]
        assert losses == pytest.approx([losses[0], 2 * losses[0], 3 * losses[0]])


def test_tied_embeddings_count_twice_in_loss_and_once_in_bytes(model, gguf):
    tensors = GgufFile(model[0]).tensors
    tied = grouped(tensors.values(), True)
    assert [g for g in tied if g.startswith("token_embd")] == ["token_embd (looked up)", "token_embd"]
    assert parts("token_embd.weight", False) == (Part("token_embd.weight", LOOKUP),)
    untied = grouped(GgufFile(gguf()).tensors.values(), False)
    assert {"token_embd (looked up)", "output"} <= untied.keys()
    known = Sensitivities(errors={p: {"Q4_K": Error(1, 1)} for p in parts("token_embd.weight", True)})
    assert not known.lacks({p: [TYPE_BY_NAME["Q4_K"]] for p in known.errors})


# Recipes


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    """The command's own result."""
    src, imatrix = model
    folder = tmp_path_factory.mktemp("made")
    words = folder / "words.txt"
    words.write_text("\n".join(tiny.SENTENCES * 30))
    arguments = ["quantize", src, folder / "out.gguf", "--bpw", "4.5", "--imatrix", imatrix, "--text", words,
                 "--held-out", words, "--eval-chunks", "2", "--effort", "fast", "--threads", "1", "--json"]  # fmt: skip
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_better_one_is_kept_and_both_are_told(made, model):
    own, *stock = made["contenders"]
    assert own["name"] == "allocation"
    assert stock
    assert [c["kept"] for c in made["contenders"]].count(True) == 1
    best = min((c for c in made["contenders"] if c["fits"]), key=lambda c: c["kld"])
    assert best["kept"]
    assert best["name"] == made["kept"]
    assert made["compared"]["kld"]["low"] <= made["compared"]["kld"]["value"] <= made["compared"]["kld"]["high"]
    assert made["compared"]["kld"]["value"] == pytest.approx(own["kld"] / stock[0]["kld"])
    assert made["kept"] == "allocation", "with every type at hand the mixture beats the stock's"


def test_a_recipe_makes_the_same_bytes_again(made, model, tmp_path):
    src, imatrix = model
    again = tmp_path / "again.gguf"
    result = CliRunner().invoke(
        cli, ["quantize", str(src), str(again), "--recipe", made["recipe"], "--imatrix", str(imatrix), "--json"]
    )
    assert result.exit_code == 0, result.output
    assert sha256(again) == sha256_of(made)
    assert "note" not in result.stderr
    unweighted = CliRunner().invoke(cli, ["quantize", str(src), str(again), "--recipe", made["recipe"], "--force"])
    assert "another one gives other bytes" in unweighted.output


def sha256_of(made):
    from pathlib import Path

    return sha256(Path(made["path"]))


def test_a_recipe_for_llama_quantize(made, model):
    """NAME=TYPE between white space, NAME a regular expression without capitals (llama.cpp tools/quantize/quantize.cpp)."""
    from pathlib import Path

    recipe = read_recipe(Path(made["recipe"]))
    lines = Path(made["tensor_types"]).read_text().split()
    wishes = [tuple(line.split("=", 1)) for line in lines]
    assert [pattern for pattern, _ in wishes] == [pattern.lower() for pattern, _ in wishes]
    planned = plan(model[0], recipe.type, imatrix=model[1], tensor_types=[(p, t.upper()) for p, t in wishes])
    assert {t.name: t.type for t in planned.tensors if t.name in recipe.types} == dict(recipe.types)
    assert planned.nbytes == recipe.nbytes


def test_a_recipe_serves_a_model_of_another_depth(model, found, gguf):
    recipe = Recipe("tiny", "Q4_K_M", "plain", 0, found.types)
    deep = gguf(hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    types = applied(recipe, GgufFile(deep), quantized(deep))
    assert types.keys() == set(quantized(deep))
    assert types["blk.3.ffn_down.weight"] == types["blk.2.ffn_down.weight"] == found.types["blk.1.ffn_down.weight"]
    assert types["output.weight"] == found.types["token_embd.weight"]
    other = replace(recipe, types={n: t for n, t in found.types.items() if "attn_v" not in n})
    with pytest.raises(QuantizeError, match=r"nothing about blk\.0\.attn_v\.weight"):
        applied(other, GgufFile(deep), quantized(deep))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("format = 1", "format = 2"), "format = 2"),
        (('rounding = "plain"', 'rounding = "best"'), "best"),
        (("nbytes = 5", 'nbytes = "5"'), "nbytes = '5'"),
        (("nbytes = 5", ""), "lacks nbytes"),
        (("nbytes = 5", "nbytes = 5\nsize = 6"), "has size"),
        (('"Q4_K"', '"Q4_L"'), r"a\.weight = 'Q4_L'"),
        (("[tensors]", "[tensors"), "no recipe"),
        (('"a.weight" = "Q4_K"', ""), "names no tensors"),
    ],
)
def test_a_bad_recipe_is_refused_by_name(tmp_path, change, said):
    path = tmp_path / "x.recipe.toml"
    write_recipe(Recipe('a "model"\n', "Q4_K_M", "plain", 5, {"a.weight": "Q4_K"}), path, tmp_path / "x.txt")
    assert asdict(read_recipe(path))["model"] == 'a "model"\n'
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    with pytest.raises(QuantizeError, match=said):
        read_recipe(path)
    with pytest.raises(QuantizeError, match="cannot be read"):
        read_recipe(tmp_path / "none.toml")


def test_one_way_to_say_how_small(model, tmp_path):
    src, dst = str(model[0]), str(tmp_path / "x.gguf")
    for arguments, said in (
        ([], "none was given"),
        (["-t", "Q4_K_M", "--size", "2MB"], "--size and --type was given"),
        (["--size", "2MB", "--pure"], "--pure"),
    ):
        result = CliRunner().invoke(cli, ["quantize", src, dst, *arguments])
        assert result.exit_code == 2
        assert said in result.output


def test_efforts_grow():
    fast, normal, thorough = EFFORTS.values()
    assert fast.chunks < normal.chunks < thorough.chunks
    assert fast.rows < normal.rows < thorough.rows
