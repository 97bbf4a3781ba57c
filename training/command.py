"""What training.pretrain and training.sft have in common: a recipe in, one result out, told by one process of several."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from cnq import terminal
from cnq.errors import TrainingStopped

from .recipe import Recipe, read_recipe

if TYPE_CHECKING:
    from .plan import Plan
    from .run import Data, Trained
    from .sources import Sources

STOPPED = 128 + signal.SIGTERM  # the exit code that shells give a process that SIGTERM ended: a cluster's script goes by it
DRY_RUN = click.option("--dry-run", is_flag=True, help="Say what would be done; load no model.")
R = TypeVar("R", bound=Recipe)


def run(
    kind: type[R],
    read_data: Callable[[R, "Sources"], "Data"],
    path: Path,
    overrides: Sequence[str],
    *,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Train what a recipe says, and show it. read_data: of training.run.train, with the recipe first."""
    first = os.environ.get("RANK", "0") == "0"
    silence_libraries()
    recipe = read_recipe(kind, path, overrides)
    from .run import planned_only, train  # torch and transformers load here, when the recipe is sound

    report = terminal.Progress(quiet=as_json or not first)
    show = (lambda plan: None) if as_json or not first else _show_plan
    if dry_run:
        plan = planned_only(recipe, lambda sources: read_data(recipe, sources), say=report.say)
        terminal.emit(plan, as_json, _show_plan)
        return
    quiet = as_json or not first
    try:
        result = train(recipe, lambda s: read_data(recipe, s), force=force, quiet=quiet, say=report.say, planned=show)
    except TrainingStopped as stopped:
        if first:
            click.echo(str(stopped), err=True)
        sys.exit(STOPPED)
    if first:
        terminal.emit(result, as_json, _show)


def _show_plan(plan: "Plan") -> None:
    m = plan.memory
    click.echo(f"parameters  {plan.parameters:,}, of them trained {plan.trained:,} ({plan.trained / plan.parameters:.2%})")
    names = ("weights", "gradients", "optimizer", "activations")
    parts = ", ".join(f"{name} {terminal.size(int(getattr(m, name)))}" for name in names)
    host = f"; {terminal.size(int(m.host))} of the machine's" if m.host else ""
    click.echo(f"memory      about {terminal.size(int(m.total))} a GPU: {parts}{host} (estimated)")
    steps = f"{plan.steps:,} steps of" if plan.steps else "steps of"
    total = f", {plan.steps * plan.tokens_per_step:,} in all" if plan.steps else ""
    click.echo(f"training    {steps} {plan.tokens_per_step:,} tokens{total}; {plan.world} process(es)")


def _show(result: "Trained") -> None:
    held_out = "".join(f", {name.replace('_', ' ')} {value:.4g}" for name, value in result.held_out.items() if name != "loss")
    click.echo(f"{result.path}/: {result.steps} steps in {result.seconds:.0f} s, loss {result.loss:.4g}{held_out}")
    click.echo(f"next        python -m training.merge_lora BASE {result.path} MERGED")


def silence_libraries() -> None:
    """What they say of themselves. Call it before they load."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warns of forks, which data loaders make
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="'pin_memory' argument")  # of data loaders, on a CPU
    for name in ("bitsandbytes", "deepspeed", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
