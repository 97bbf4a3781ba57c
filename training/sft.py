"""Instruction tuning: conversations → an adapter that answers. Only answers are learned, in the prompt format of inference."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cnq.cli import FILE, FORCE, JSON, Command
from cnq.prompts import named, render

from .command import DRY_RUN, run
from .recipe import Tuning

if TYPE_CHECKING:
    from .run import Data
    from .sources import Sources


def read_data(recipe: Tuning, sources: "Sources") -> "Data":
    """Conversations as examples. Raises CorpusError, PromptError."""
    from .batches import Flattened, Packed, Padded
    from .examples import examples
    from .run import Data, cache_folder

    tokenizer, length = sources.tokenizer, recipe.max_length
    format = named(recipe.format) if recipe.format else None
    made = examples(
        [Path(path) for path in recipe.data], tokenizer, format, max_length=length, too_long=recipe.too_long,
        cache=cache_folder(recipe), held_out=recipe.held_out, seed=recipe.argument("seed"),
    )  # fmt: skip
    train = Packed(made.train, length) if recipe.packing else made.train
    return Data(
        train=train,
        held_out=made.held_out,
        collator=Flattened() if recipe.packing else Padded(),
        counts=made.counts,
        n=len(train),
        samples={
            text: _prompt(tokenizer, format.jinja if format else tokenizer.chat_template, text) for text in recipe.samples
        },
    )


def _prompt(tokenizer: Any, jinja: str, text: str) -> list[int]:
    """A question as inference puts it, with exactly one bos in front if the model wants one."""
    bos = tokenizer.bos_token or ""
    whole = render(jinja, [{"role": "user", "content": text}], bos=bos, eos=tokenizer.eos_token or "")
    adds_bos = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return list(tokenizer(whole.removeprefix(bos) if adds_bos else whole).input_ids)


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
