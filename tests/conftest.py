"""Shared fixtures: tiny checkpoints and GGUFs, made once a run."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "golden"))
sys.path.append(str(Path(__file__).parents[1] / "tools"))

import tiny

from cnq.convert import convert


@pytest.fixture(scope="session")
def gguf(tmp_path_factory) -> Callable[..., Path]:
    """gguf(dtype="f16", **arguments of tiny.checkpoint) -> the converted file, beside its checkpoint `hf/`."""
    made: dict[str, Path] = {}

    def make(*, dtype: str = "f16", **settings) -> Path:
        key = repr((dtype, sorted(settings.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("model")
            source = tiny.checkpoint(folder / "hf", **settings)
            made[key] = convert(source, folder / f"tiny-{dtype.upper()}.gguf", dtype=dtype).path
        return made[key]

    return make


@pytest.fixture(scope="session")
def wide_gguf(gguf) -> Path:
    """F16, rows of 256: every K-quant applies."""
    return gguf(hidden_size=256, intermediate_size=512)


@pytest.fixture(autouse=True)
def own_records(tmp_path_factory, monkeypatch) -> None:
    """What `cnq bench` remembers for this machine's user is none of the tests' business."""
    monkeypatch.setattr("cnq.tuning.user_dir", lambda kind: tmp_path_factory.getbasetemp() / "user" / kind)
