"""Instruction tuning: conversations → an adapter that answers. Only answers are learned, in the prompt format of inference."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cnq.cli import FILE, FORCE, JSON, Command

from .command import DRY_RUN, run
from .recipe import Tuning

if TYPE_CHECKING:
    from .run import Data
    from .sources import Sources


def read_data(recipe: Tuning, sources: "Sources") -> "Data":
    raise NotImplementedError


@click.command(cls=Command)
@click.argument("recipe", type=FILE)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@DRY_RUN
@FORCE
@JSON
def main(recipe: Path, overrides: Sequence[str], **options: Any) -> None:
    """Train an adapter on conversations, as RECIPE says: a file of training/configs/, or your own.

    KEY=VALUE changes a key of the recipe, or gives an argument of transformers' Trainer. `torchrun` starts several.

    \b
    python -m training.sft configs/sft_llama3_8b.yaml base=llama3-8b-hf/ data=alpaca_zh.json output=out/
    torchrun --nproc_per_node 8 -m training.sft configs/sft_llama2_7b.yaml deepspeed=zero2 …
    """
    run(Tuning, read_data, recipe, overrides, **options)


if __name__ == "__main__":
    main(prog_name="python -m training.sft")
