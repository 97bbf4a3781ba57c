"""How a model is run: settings reach llama.cpp, cnq bench chooses and remembers them, and only its own record is believed."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import llama_cpp.llama_cpp as lib
import numpy as np
import pytest
from click.testing import CliRunner

from cnq import bench as benching
from cnq import files, trials, tuning
from cnq.bench import _Search, _Trial, bench
from cnq.chat import open_chat
from cnq.cli import cli
from cnq.engine import child as children
from cnq.engine.child import Child
from cnq.engine.model import Model, Sampling
from cnq.errors import EngineError, GgufError
from cnq.gguf_file import GgufFile
from cnq.machine import Machine
from cnq.trials import _Trials
from cnq.tuning import PLAIN, Tuned, best, remember

OTHER = Tuned(threads=3, threads_batch=2, batch=64, flash_attn=False, type_kv="F16", mlock=True, repack=False)


@pytest.fixture(autouse=True)
def one_core(monkeypatch) -> None:
    """Threads that wait for each other take long where others compute, too."""
    monkeypatch.setattr(benching, "physical_cores", lambda: 1)
    monkeypatch.setattr(benching, "logical_cores", lambda: 1)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where records go."""
    monkeypatch.setattr(tuning, "user_dir", lambda kind: tmp_path / kind)
    return tmp_path / "cache" / "tuning"


# What is remembered


def test_what_was_remembered_is_found_again_under_any_name(gguf, tmp_path, folder):
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf().read_bytes())
    assert best(path) == PLAIN
    remember(path, OTHER, {"found": "for a person"})
    assert best(path) == best(path.rename(tmp_path / "b.gguf")) == OTHER
    assert [p.suffix for p in folder.iterdir()] == [".json"]


def test_another_file_machine_or_build_has_its_own_record(gguf, tmp_path, folder, monkeypatch):
    path = gguf()
    remember(path, OTHER, {})
    longer = tmp_path / "longer.gguf"
    longer.write_bytes(path.read_bytes() + b"\0")
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(path.read_bytes().replace(b"general.name", b"general.nama", 1))
    assert best(longer) == best(changed) == PLAIN
    monkeypatch.setattr(tuning, "this_machine", lambda: Machine("another", 2, 10**10))
    assert best(path) == PLAIN
    monkeypatch.undo()
    monkeypatch.setattr(tuning, "user_dir", lambda kind: folder.parents[1] / kind)
    assert best(path) == OTHER
    monkeypatch.setattr(tuning, "logical_cores", lambda: 999)
    assert best(path) == PLAIN


@pytest.mark.parametrize(
    "damage",
    [
        b"", b"{", b"[]", b"null", b'{"tuned": null}', b'{"tuned": []}', b'{"tuned": {}}', b"\xff\xfe",
        b'{"tuned": {"threads": 2}}',
        {"threads": -1}, {"threads": 1.5}, {"threads": True}, {"threads": "2"}, {"threads_batch": 10**9}, {"batch": 0},
        {"flash_attn": 1}, {"type_kv": "F64"}, {"type_kv": ["F16"]}, {"mlock": None}, {"repack": "yes"}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_record_is_no_record(gguf, folder, damage):
    record = remember(gguf(), OTHER, {})
    if isinstance(damage, dict):
        content = json.loads(record.read_text())
        content["tuned"] |= damage
        damage = json.dumps(content).encode()
    record.write_bytes(damage)
    assert best(gguf()) == PLAIN


def test_a_file_that_is_not_there_is_one_error(tmp_path):
    with pytest.raises(GgufError, match=r"none\.gguf cannot be read"):
        best(tmp_path / "none.gguf")
    with pytest.raises(GgufError, match="cannot be read"):
        best(tmp_path)


def test_records_go_where_the_user_s_caches_go(monkeypatch, tmp_path):
    monkeypatch.setattr(files.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.user_dir("cache") == tmp_path / "cnq"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/none")
    assert files.user_dir("cache") == Path.home() / ".cache" / "cnq"


# What llama.cpp is told


def test_settings_reach_llama_cpp(wide_gguf):
    with Model(wide_gguf, n_ctx=256, tuned=replace(OTHER, mlock=False)) as model:
        assert (lib.llama_n_threads(model._ctx), lib.llama_n_threads_batch(model._ctx)) == (3, 2)
        assert (lib.llama_n_batch(model._ctx), lib.llama_n_ubatch(model._ctx), model.n_batch) == (64, 64, 64)
        assert model._params.flash_attn_type == lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        with model.fork(Tuned(threads=1, threads_batch=4, batch=128, type_kv="Q8_0")) as other:
            assert (lib.llama_n_threads(other._ctx), lib.llama_n_threads_batch(other._ctx)) == (1, 4)
            assert (other.n_batch, other._params.type_k, other._params.type_v) == (128, 8, 8)
            for context in (model, other):
                context.next_logits(range(3, 50))
            assert lib.llama_state_seq_get_size(other._ctx, 0) < 0.6 * lib.llama_state_seq_get_size(model._ctx, 0)
        assert model.n_batch == 64


def test_threads_that_the_user_names_win(gguf):
    with Model(gguf(), n_ctx=256, n_threads=2, tuned=OTHER) as model:
        assert (lib.llama_n_threads(model._ctx), lib.llama_n_threads_batch(model._ctx)) == (2, 2)


@pytest.mark.parametrize(
    "tuned",
    [Tuned(flash_attn=False), Tuned(batch=16), Tuned(repack=False), Tuned(mlock=True), Tuned(threads=2, threads_batch=1)],
    ids=str,
)
def test_ways_that_only_round_otherwise_give_the_same_answer(wide_gguf, tuned):
    prompt = list(range(3, 60))
    with Model(wide_gguf, n_ctx=256, exact=True) as model:
        expected = model.logits(prompt)
        answer = list(model.generate(prompt, Sampling(temperature=0), 8))
    with Model(wide_gguf, n_ctx=256, tuned=tuned) as model:
        np.testing.assert_allclose(model.logits(prompt), expected, atol=0.02)
        assert list(model.generate(prompt, Sampling(temperature=0), 8)) == answer


def test_keys_and_values_of_8_bits_change_more_but_little(wide_gguf):
    prompt = list(range(3, 60))
    with Model(wide_gguf, n_ctx=256, exact=True) as exact, Model(wide_gguf, n_ctx=256, tuned=Tuned(type_kv="Q8_0")) as model:
        expected, found = exact.logits(prompt), model.logits(prompt)
    assert 1e-4 < np.abs(found - expected).max() < 0.2


def test_a_batch_is_filled_for_every_pass(gguf):
    """Positions and wanted logits of passes of all lengths, against passes of one token."""
    ids = [3 + i % 50 for i in range(70)]
    with Model(gguf(), n_ctx=256, n_batch=32, exact=True) as model:
        whole, rest = model.logits(ids), model.logits(ids, 40)
        single = [model.next_logits(ids[: n + 1]).copy() for n in range(len(ids))]
    np.testing.assert_array_equal(whole[40:], rest)
    np.testing.assert_allclose(whole, single, atol=0.01)  # other roundings to float16


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_what_a_token_takes_in_the_context_is_told_from_the_file(gguf, kv_heads):
    """Against what llama.cpp writes of a context: keys and values in two bytes each, and a little besides."""
    path = gguf(num_key_value_heads=kv_heads)
    with Model(path, n_ctx=256) as model:
        sizes = []
        for n in (50, 150):
            model.next_logits([3] * n)
            sizes.append(lib.llama_state_seq_get_size(model._ctx, 0))
    assert 0 <= (sizes[1] - sizes[0]) / 100 - 2 * GgufFile(path).kv_width <= 32


def test_a_chat_is_run_as_bench_chose(gguf, folder):
    path = gguf(vocab="spm-added")
    remember(path, Tuned(threads=1, threads_batch=3, batch=64), {})
    with open_chat(path) as chat:
        assert (lib.llama_n_threads(chat.model._ctx), lib.llama_n_threads_batch(chat.model._ctx)) == (1, 3)
        assert chat.model.n_batch == 64
    with open_chat(path, threads=2) as chat:
        assert lib.llama_n_threads(chat.model._ctx) == 2


# What is chosen


def test_threads_are_tried_around_the_number_of_cores(gguf, monkeypatch):
    def counts(cores, threads):
        monkeypatch.setattr(benching, "logical_cores", lambda: threads)
        search = _Search(GgufFile(gguf()), None, 1, print)
        return next(search._trials(Tuned(threads=cores), "F16")).values

    assert counts(1, 1) == (1,)
    assert counts(2, 4) == (2, 1, 4)
    assert counts(8, 16) == (8, 4, 6, 16)


@pytest.fixture(scope="module")
def found(wide_gguf, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(tuning, "user_dir", lambda kind: folder)
        patch.setattr(benching, "physical_cores", lambda: 1)
        patch.setattr(benching, "logical_cores", lambda: 1)
        said: list[str] = []
        ticks: list[tuple[int, int]] = []
        result = bench(wide_gguf, quick=True, say=said.append, progress=lambda done, total: ticks.append((done, total)))
        return result, said, ticks, best(wide_gguf)


def test_bench_remembers_what_it_chose(found, wide_gguf):
    result, _, _, remembered = found
    assert remembered == result.tuned
    record = json.loads(result.record.read_text())
    assert record["tuned"] == result.tuned.__dict__
    assert record["found"]["rounds"] == result.rounds == 3
    assert record["model"] == wide_gguf.name


def test_what_is_kept_is_in_the_table_and_in_force(found):
    result = found[0]
    for knob in result.knobs:
        (kept,) = (o for o in knob.options if o.kept)
        value = getattr(result.tuned, knob.name)
        in_force = ("on" if value else "off") if isinstance(value, bool) else str(value)
        assert kept.value == in_force
        assert knob.options[0].ratio is None
        for option in knob.options[1:]:
            middle, least, most = option.ratio
            assert least <= middle <= most
            assert not option.kept or (least > 1 and middle >= benching.GAIN)
    assert {k.name for k in result.knobs} >= {"repack", "flash_attn", "type_kv"}
    assert result.tuned.type_kv == "F16"


def test_what_is_slower_all_together_is_not_kept(gguf, folder, monkeypatch):
    """A way that won its own trial, while the machine was busy, and lost when all was measured again."""
    measured = []

    def ask(self, step, arguments, hear=print):
        n, rounds = len(arguments["ways"]), arguments.get("rounds")
        if step == "compare":
            return [(0.0, 0.0, 100.0)] * (n - 1)
        measured.append(arguments["ways"])
        other = (0.02, 0.2) if measured.count(arguments["ways"]) > 1 else (0.005, 0.05)
        return [[(0.01, 0.1)] * rounds] + [[other] * rounds] * (n - 1)

    monkeypatch.setattr(Child, "ask", ask)
    monkeypatch.setattr(_Search, "_trials", lambda self, plain, kv: iter([_Trial("flash_attn", "turn", (True, False))]))
    result = bench(gguf(), quick=True)
    assert result.tuned == best(gguf()) == Tuned(threads=1, threads_batch=1)
    assert result.after == result.before
    assert [option.kept for option in result.knobs[0].options] == [True, False]
    assert any("no faster" in note for note in result.notes)


def test_the_time_it_takes_is_said_before_and_every_run_is_counted(found):
    result, said, ticks, _ = found
    assert said == [f"about {result.estimate:.0f} s: 3 rounds of {result.n_prompt} tokens read and {result.n_gen} written"]
    assert [done for done, _ in ticks] == list(range(1, len(ticks) + 1))
    assert {total for _, total in ticks} == {len(ticks)}


def test_what_flash_attention_and_8_bits_change_is_measured(found):
    drifts = {(d.flash_attn, d.type_kv): d for d in found[0].drifts}
    assert list(drifts) == [(False, "F16"), (True, "F16"), (True, "Q8_0")]
    assert all(0 <= d.kld < 0.01 and 90 < d.same_top <= 100 for d in drifts.values())
    assert drifts[True, "Q8_0"].kld > drifts[True, "F16"].kld


SLOW, FAST = (1.0, 0.10), (0.5, 0.05)


@pytest.mark.parametrize(
    ("others", "kept"),
    [
        ([[SLOW] * 3], 0),
        ([[FAST] * 3], 1),
        ([[FAST, FAST, (1.1, 0.11)]], 0),  # not in every round
        ([[(0.98, 0.098)] * 3], 0),  # by less than 3 %
        ([[(0.9, 0.09)] * 3, [FAST] * 3], 2),
        ([[FAST] * 3, [(0.1, 0.01), (0.1, 0.01), (1.1, 0.11)]], 1),
    ],
)
def test_only_what_surely_helps_is_kept(others, kept):
    for measure in ("prompt", "answer", "turn"):
        assert benching._best([[SLOW] * 3, *others], measure) == kept


def test_a_turn_weighs_prompt_and_answer():
    assert benching._cost((1.0, 2.0), "turn") == 512 + 2 * 128
    assert benching._cost((1.0, 2.0), "prompt") == 1
    assert benching._cost((1.0, 2.0), "answer") == 2


def test_ways_run_in_turns(gguf, monkeypatch):
    """Each round begins with another way; runs to warm up come before."""
    runs = []
    monkeypatch.setattr(trials, "_run", lambda model, ids, n, m: runs.append((model.n_batch, n, m)) or (1.0, 1.0))
    told = []
    ways = [vars(Tuned(batch=batch)) for batch in (32, 64)]
    assert _Trials().time(told.append, str(gguf()), ways, 20, 4, 2) == [[(1.0, 1.0)] * 2] * 2
    assert runs == [(32, 16, 2), (64, 16, 2), (32, 20, 4), (64, 20, 4), (64, 20, 4), (32, 20, 4)]
    assert told == [0, 1, 1, 0]


def test_keys_and_values_of_8_bits_when_the_memory_is_too_small(gguf, folder, monkeypatch):
    path = gguf(hidden_size=256, intermediate_size=512, max_position_embeddings=4096)
    size, numbers = path.stat().st_size, 4096 * 2 * 2 * 2 * 64  # layers, keys and values, heads, their size
    monkeypatch.setattr(benching, "this_machine", lambda: Machine("small", 1, size + int(1.5 * numbers)))
    result = bench(path, quick=True)
    assert result.tuned.type_kv == "Q8_0"
    assert any("Q8_0" in note and "4096 tokens" in note for note in result.notes)


def test_heads_that_8_bits_do_not_divide_are_said(gguf, folder):
    with pytest.raises(EngineError, match="heads of 16"):
        bench(gguf(), type_kv="Q8_0")


def test_a_crash_of_native_code_is_one_error(gguf, folder, monkeypatch):
    real = subprocess.Popen

    def dying(*args, **kwargs):
        child = real(*args, **kwargs)
        child.kill()
        return child

    monkeypatch.setattr(children.subprocess, "Popen", dying)
    with pytest.raises(EngineError, match="SIGKILL"):
        bench(gguf())
    assert best(gguf()) == PLAIN


def test_bench_on_the_command_line(gguf, folder):
    result = CliRunner().invoke(cli, ["bench", str(gguf(max_position_embeddings=64)), "--quick"])
    assert result.exit_code == 0, result.output
    assert "remembered: " in result.output
    assert "type_kv" not in result.output, "its heads are too small for Q8_0"
    assert CliRunner().invoke(cli, ["bench", "none.gguf"]).exit_code == 1


def test_what_cannot_be_remembered_is_shown_all_the_same(gguf, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setattr(tuning, "user_dir", lambda kind: tmp_path / kind)
    result = CliRunner().invoke(cli, ["bench", str(gguf(max_position_embeddings=64)), "--quick"])
    assert result.exit_code == 0, result.output
    assert "times as fast" in result.output
    assert "not remembered" in result.output


def test_keys_and_values_of_8_bits_when_asked(gguf, folder):
    path = gguf(hidden_size=256, intermediate_size=512, max_position_embeddings=64)
    answer = json.loads(CliRunner().invoke(cli, ["bench", str(path), "--kv", "q8_0", "--quick", "--json"]).stdout)
    assert answer["n_prompt"] + answer["n_gen"] < 64
    assert best(path).type_kv == answer["tuned"]["type_kv"] == "Q8_0"
    assert "flash_attn" not in {k["name"] for k in answer["knobs"]}, "Q8_0 needs it"
