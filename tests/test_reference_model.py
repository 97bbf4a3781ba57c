"""The widened model of tools/reference_model.py computes what the narrow one does."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from cnq.convert import convert
from cnq.engine.model import Model

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from reference_model import dithered, widened


@pytest.mark.parametrize("tied", [False, True])
def test_wide_rows_leave_the_function_as_it_was(tied, tmp_path):
    settings = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
    narrow = tiny.checkpoint(tmp_path / "narrow", dtype="F32", tie_word_embeddings=tied, intermediate_size=256, **settings)
    wide = tiny.checkpoint(tmp_path / "wide", dtype="F32", tie_word_embeddings=tied, intermediate_size=256, **settings)
    config, weights = widened(json.loads((wide / "config.json").read_text()), load_file(wide / "model.safetensors"))
    save_file({name: np.ascontiguousarray(w) for name, w in weights.items()}, wide / "model.safetensors")
    (wide / "config.json").write_text(json.dumps(config))
    assert {w.shape[-1] for w in weights.values()} <= {256, 512}
    files = [convert(folder, tmp_path / f"{folder.name}.gguf", dtype="f32").path for folder in (narrow, wide)]
    logits = []
    for file in files:
        with Model(file, n_ctx=64, exact=True) as model:
            logits.append(model.logits(list(range(3, 40))))
    assert np.abs(logits[0] - logits[1]).max() < 1e-4 * np.abs(logits[0]).max()


def test_noise_stays_within_its_share_of_a_step():
    random = np.random.default_rng(0)
    steps = np.repeat(random.uniform(0.01, 0.1, (8, 3)), 32, axis=1).astype(np.float32)
    weights = steps * random.integers(-8, 8, steps.shape).astype(np.float32)
    found = dithered(weights, 0.5, random)
    assert np.all(np.abs(found - weights) <= 0.2501 * steps + 1e-6)
    assert len(np.unique(found)) > 0.95 * found.size
    flat = np.full((1, 32), 3, np.float32)
    assert np.array_equal(dithered(flat, 0.5, random), flat)
