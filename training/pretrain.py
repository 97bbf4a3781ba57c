"""Continued pre-training: text → an adapter that has read it. Stage 1: embeddings; stage 2: LoRA, and embeddings whole."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cnq.cli import FILE, FORCE, JSON, Command

from .command import DRY_RUN, run
from .recipe import Pretraining

if TYPE_CHECKING:
    from .run import Data
    from .sources import Sources


def read_data(recipe: Pretraining, sources: "Sources") -> "Data":
    """Text as blocks. Raises CorpusError."""
    from .batches import Padded
    from .blocks import blocks
    from .run import Data, cache_folder

    made = blocks(
        [Path(path) for path in recipe.data], sources.tokenizer, block_size=recipe.block_size, cache=cache_folder(recipe),
        held_out=recipe.held_out, seed=recipe.argument("seed"), documents=recipe.documents, streaming=recipe.streaming,
    )  # fmt: skip
    return Data(
        train=made.train,
        held_out=made.held_out,
        collator=Padded(),
        counts=made.counts,
        n=made.counts.blocks,
        samples={text: sources.tokenizer(text).input_ids for text in recipe.samples},
    )


@click.command(cls=Command)
@click.argument("recipe", type=FILE)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@DRY_RUN
@FORCE
@JSON
def main(recipe: Path, overrides: Sequence[str], **options: Any) -> None:
    """Train an adapter on text, as RECIPE says: a file of training/configs/, or your own.

    KEY=VALUE changes a key of the recipe, or gives an argument of transformers' Trainer. `torchrun` starts several.

    \b
    python -m training.pretrain configs/pretrain_llama2_7b.yaml base=llama2-7b-hf/ data=corpus/ output=out/
    torchrun --nproc_per_node 8 -m training.pretrain configs/pretrain_llama_7b.yaml deepspeed=zero2 …
    """
    run(Pretraining, read_data, recipe, overrides, **options)


if __name__ == "__main__":
    main(prog_name="python -m training.pretrain")
