"""What is tools/demo.py's own on the road, on a model of two layers."""

from pathlib import Path

import pytest
import tiny

from cnq import terminal
from cnq.adapters import read_adapter
from cnq.build import build
from cnq.corpus import chunks, peoples_daily
from cnq.errors import TrainingError
from cnq.evaluate import evaluate

for package in ("torch", "transformers", "peft", "accelerate", "datasets", "deepspeed", "bitsandbytes", "tensorboard"):
    pytest.importorskip(package)
demo = pytest.importorskip("demo")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("demo") / "base", vocab="spm-added")


class Heard(terminal.Progress):
    """What was there already."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.kept: list[str] = []

    def skipped(self, path) -> None:
        self.kept.append(path.name)


def test_nothing_that_is_measured_on_is_read(tmp_path):
    text = (demo._text(tmp_path) / "peoples_daily.txt").read_text(encoding="utf-8")
    articles = text.removesuffix("\n").split("\n\n")
    assert articles == list(peoples_daily("calibration").documents)
    assert not set(articles) & set(peoples_daily("held-out").documents)


def test_training_is_done_once_and_goes_on_where_it_was_broken_off(base, tmp_path, monkeypatch):
    from training.trainer import AdapterTrainer

    steps = []
    whole = AdapterTrainer.training_step

    def broken(self, *args, **options):
        steps.append(self.state.global_step)
        if steps == [0, 1, 2]:
            raise KeyboardInterrupt
        return whole(self, *args, **options)

    monkeypatch.setattr(AdapterTrainer, "training_step", broken)
    recipe, heard = demo._recipe(base, tmp_path, 4, 1, 32), Heard()
    with pytest.raises(KeyboardInterrupt):
        demo._trained(recipe, heard)
    assert demo._trained(recipe, heard) > 0
    assert steps == [0, 1, 2, 2, 3]
    assert read_adapter(tmp_path / "lora-4-steps").low_rank
    assert heard.kept == []
    assert demo._trained(recipe, heard) == 0
    assert (heard.kept, len(steps)) == (["lora-4-steps"], 5)


def test_figures_are_the_reports(base, tmp_path):
    built = build(str(base), [demo.TYPE], out=tmp_path, chunks=0, eval_chunks=2, progress=Heard())
    figures = demo._figures("before", built.report, built.result, built.format)

    def text(model):
        return chunks([peoples_daily("held-out")], lambda t: model.tokenize(t, add_special=True, parse_special=False), 512, 2)

    for bits, made in zip((figures.float_bits, figures.quantized_bits), built.files, strict=True):
        (measured,) = evaluate([made.path], text).models
        assert bits == pytest.approx(measured.bits_per_byte, rel=1e-6)
    assert figures.nbytes == built.result.stat().st_size


def test_no_gain_is_an_error():
    demo._require_gain(2.4, 2.3, Path("lora"))
    for after in (2.4, 2.5, float("nan")):
        with pytest.raises(TrainingError, match="Remove lora"):
            demo._require_gain(2.4, after, Path("lora"))


def test_the_table(capsys):
    before, after = (
        demo.Figures(name, bits, bits + 0.05, 105_000_000, "北京。") for name, bits in (("before", 2.4), ("after", 2.1))
    )
    demo._show(demo.Demo(before, after, 65_536, 0.0, 70.0, Path("m.gguf"), Path("Modelfile")))
    shown = capsys.readouterr().out
    assert all(figure in shown for figure in ("2.400", "2.450", "2.100", "2.150", "105.0 MB", "北京。", "65,536 tokens before"))
