"""Tiny runs of training: a recipe for tiny.py's checkpoints on a few sentences, in this process or in several."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tiny

from training.pretrain import read_data as read_text
from training.recipe import Pretraining, Recipe, Tuning, recipe_of
from training.run import Trained, train
from training.sft import read_data as read_conversations

ROOT = Path(__file__).parents[2]
EMBEDDINGS = ["embed_tokens", "lm_head"]
DEFAULTS: dict[str, Any] = {
    "dtype": "fp32", "held_out": 0.1, "max_steps": 4, "logging_steps": 1, "learning_rate": 1e-2, "use_cpu": True,
    "per_device_train_batch_size": 2, "lora": {"dropout": 0.0}, "save_steps": 100,
}  # fmt: skip


def corpus(folder: Path) -> Path:
    """A folder with lines to read, and one with questions to answer: text/, sft/."""
    lines = [f"{i} {line}" for i in range(4) for line in tiny.SENTENCES]
    for name, content in {
        "text/lines.txt": "\n".join(lines),
        "sft/alpaca.json": json.dumps([{"instruction": f"第{i}句？", "input": "", "output": s} for i, s in enumerate(lines)]),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def text_recipe(base: Path, data: Path, output: Path, **keys: Any) -> Pretraining:
    own = {"base": str(base), "data": str(data / "text"), "output": str(output), "cache": str(data / "cache"), "block_size": 32}
    return recipe_of(Pretraining, DEFAULTS | own | keys)


def sft_recipe(base: Path, data: Path, output: Path, **keys: Any) -> Tuning:
    own = {"base": str(base), "data": str(data / "sft"), "output": str(output), "cache": str(data / "cache"),
           "max_length": 192, "format": "llama-2"}  # fmt: skip
    return recipe_of(Tuning, DEFAULTS | own | keys)


def run(recipe: Recipe, **options: Any) -> Trained:
    read: Any = read_text if isinstance(recipe, Pretraining) else read_conversations
    return train(recipe, lambda sources: read(recipe, sources), quiet=True, **options)


def losses(trained: Trained) -> list[float]:
    """Of each step."""
    return [log["loss"] for log in json.loads(trained.record.read_text())["history"] if "loss" in log]


def written(recipe: Recipe, path: Path) -> Path:
    """The recipe as a file."""
    keys = recipe.model_dump(mode="json", exclude={"arguments"}) | recipe.arguments
    path.write_text(json.dumps(keys), encoding="utf-8")  # JSON is YAML
    return path


def spawn(code: str, *arguments: Any) -> subprocess.Popen:
    """Python with these lines, that finds the project and one core."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


ALONE = "from training.pretrain import main; main()"
# What torchrun does, for one recipe after the other, but what has to be imported is imported once.
# DeepSpeed compiles a collective over shared memory when it starts on a CPU, which takes a minute; gloo does without.
IN_TWO = """
import os, socket, sys
import deepspeed.ops
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
import training.batches, training.blocks, training.run
from training.pretrain import main

def work(recipe, rank, port):
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})
    try:
        main([recipe, "--json"])
    except SystemExit as end:
        os._exit(end.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(1)

failed = 0
for recipe in sys.argv[1:]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            work(recipe, rank, port)
        children.append(child)
    failed |= any([os.waitpid(child, 0)[1] for child in children])
sys.exit(failed)
"""
