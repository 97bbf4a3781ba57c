"""One run of a recipe: what it starts from, the data, the model, the training, and an adapter with a record beside it."""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from cnq import __version__
from cnq.adapters.settings import CONFIG, read_settings
from cnq.errors import CheckpointError, OutputExists, RecipeError, TrainingStopped
from cnq.files import user_dir

from .model import DTYPES, adapter_config, explaining_memory, grow, load_base, with_adapter
from .plan import Plan, plan
from .recipe import Recipe
from .safety import Board, Say, StopOnSignal, require_effect
from .sources import Sources, base_digest, find_sources
from .trainer import AdapterTrainer

RECORD = "training.json"


@dataclass(frozen=True)
class Data:
    """train, held_out: datasets of rows for the collator; held_out is None when nothing is. n: rows of train, None = unknown.

    counts: a dataclass of what is in them, with held_out_bytes and held_out_tokens. samples: prompts -> their tokens.
    """

    train: Any
    held_out: Any
    n: int | None
    collator: Any
    counts: Any
    samples: Mapping[str, Sequence[int]]

    @property
    def bytes_per_token(self) -> float | None:
        """Of the text that the held-out labels stand for."""
        tokens = self.counts.held_out_tokens
        return self.counts.held_out_bytes / tokens if tokens else None


@dataclass(frozen=True)
class Trained:
    """path: of the adapter. loss: of the last logged step. held_out: loss, perplexity and bits per byte at the end."""

    path: Path
    record: Path
    plan: Plan
    steps: int
    loss: float
    held_out: dict[str, float]
    seconds: float


def train(
    recipe: Recipe,
    read_data: Callable[[Sources], Data],
    *,
    force: bool = False,
    quiet: bool = False,
    say: Say = lambda text: None,
    planned: Callable[[Plan], object] = lambda plan: None,
) -> Trained:
    """Train what a recipe says, on this process's part of it when there are several, and write the adapter to its output.

    read_data: called with the sources, before the model is loaded. planned: called with what is going to happen. quiet: no
    progress bar. The adapter appears at the top of the output when it is complete; checkpoints lie beside it.
    Raises OutputExists, what find_sources and read_data raise, TrainingError (diverged, out of memory, stopped by SIGTERM).
    """
    started = time.perf_counter()
    arguments = _arguments(recipe, quiet)
    resumed = _place(recipe, force, arguments.should_save)
    sources, data, what = _prepared(recipe, arguments, read_data, say)
    digest = base_digest(sources) if arguments.should_save else ""
    if arguments.should_save:
        for folder in filter(None, (sources.adapter, resumed)):
            _require_base(folder, digest, sources)
    planned(what)
    set_seed(arguments.seed)
    model = load_base(recipe, sources.base, arguments.device)
    if sources.new:
        grow(model, sources.new)
    model = with_adapter(model, recipe, sources.adapter)
    stop = StopOnSignal()
    board = Board(recipe.output / "runs", data.samples, sources.tokenizer, recipe.sample_tokens, DTYPES[recipe.dtype], say)
    trainer = AdapterTrainer(
        recipe=recipe, digest=digest, tokenizer_folder=sources.tokenizer_folder, bytes_per_token=data.bytes_per_token,
        model=model, args=arguments, data_collator=data.collator, train_dataset=data.train, eval_dataset=data.held_out,
        processing_class=sources.tokenizer, callbacks=[stop, board],
    )  # fmt: skip
    if quiet:
        trainer.remove_callback(PrinterCallback)
    with explaining_memory(recipe):
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        if stop.stopped:
            trainer.accelerator.wait_for_everyone()  # a cluster kills the others when the first process ends
            raise TrainingStopped(
                f"stopped by SIGTERM after step {trainer.state.global_step}; it is saved in {recipe.output}/checkpoint-"
                f"{trainer.state.global_step}. Go on with resume_from_checkpoint=true."
            )
        held_out = _measured(trainer) if data.held_out is not None else {}
    _finish(trainer, recipe.output)
    result = Trained(
        path=recipe.output,
        record=recipe.output / RECORD,
        plan=what,
        steps=trainer.state.global_step,
        loss=next((log["loss"] for log in reversed(trainer.state.log_history) if "loss" in log), float("nan")),
        held_out=held_out,
        seconds=time.perf_counter() - started,
    )
    if arguments.should_save:
        _write_record(result, recipe, sources, data, digest, trainer.state.log_history)
    return result


def planned_only(recipe: Recipe, read_data: Callable[[Sources], Data], *, say: Say = lambda text: None) -> Plan:
    """What `train` would do: everything is looked at, the data made ready, no model loaded. Raises what `train` raises."""
    return _prepared(recipe, _arguments(recipe, True), read_data, say)[2]


def _arguments(recipe: Recipe, quiet: bool) -> TrainingArguments:
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says on stdout that it looked for one
    given = {"use_cpu": not torch.accelerator.is_available()} | recipe.trainer_arguments()
    try:
        arguments = TrainingArguments(
            output_dir=str(recipe.output), report_to="none", logging_nan_inf_filter=False, remove_unused_columns=False,
            prediction_loss_only=True, disable_tqdm=quiet, **given,
        )  # fmt: skip
    except ValueError as error:
        raise RecipeError(f"the Trainer refuses the recipe: {str(error).splitlines()[0].rstrip('.')}.") from error
    if recipe.deepspeed and arguments.world_size > 1:
        import deepspeed

        deepspeed.init_distributed(auto_mpi_discovery=False)  # on a CPU nobody else does, and ZeRO-3 has to know when it loads
    return arguments


def _prepared(
    recipe: Recipe, arguments: TrainingArguments, read_data: Callable[[Sources], Data], say: Say
) -> tuple[Sources, Data, Plan]:
    """One process of a machine goes first: the others find what it fetched and tokenized."""
    with arguments.main_process_first(desc="sources and data"):
        sources = find_sources(recipe, say)
        data = read_data(sources)
    rows = sources.rows + len(sources.new)
    lora = adapter_config(recipe, bool(sources.config.tie_word_embeddings), sources.adapter)
    return sources, data, plan(recipe, sources.config, lora, rows, data.n, arguments.world_size)


def _measured(trainer: AdapterTrainer) -> dict[str, float]:
    """What the held-out text says of the finished model."""
    last = next((log for log in reversed(trainer.state.log_history) if "eval_loss" in log), {"step": -1})
    found = last if last["step"] == trainer.state.global_step else trainer.evaluate()
    names = ("loss", "perplexity", "bits_per_byte")
    return {name: found[f"eval_{name}"] for name in names if f"eval_{name}" in found}


def cache_folder(recipe: Recipe) -> Path:
    """Where tokenized data is kept."""
    return recipe.cache or user_dir("cache") / "training"


def _place(recipe: Recipe, force: bool, first: bool) -> Path | None:
    """The checkpoint to go on from, or None. force: those of another run are removed, by the `first` process.

    Raises OutputExists, CheckpointError.
    """
    out = recipe.output
    steps = {int(p.name.partition("-")[2]): p for p in out.glob("checkpoint-*") if p.name.partition("-")[2].isdigit()}
    complete = {step: p for step, p in steps.items() if (p / "trainer_state.json").is_file()}  # which is written last
    if isinstance(recipe.resume_from_checkpoint, str):
        named = Path(recipe.resume_from_checkpoint)
        if not (named / "trainer_state.json").is_file():
            known = ", ".join(str(complete[step]) for step in sorted(complete)) or "none that is complete"
            raise CheckpointError(f"{named} is no checkpoint of a run. In {out} there is {known}.")
        return named
    if (out / CONFIG).is_file() and not force:
        raise OutputExists(f"{out} holds an adapter. Name another output=…, or replace it: --force.")
    if recipe.resume_from_checkpoint:
        return complete[max(complete)] if complete else None
    if steps and not force:
        raise OutputExists(
            f"{out} holds checkpoints of a run, the last at step {max(steps)}. Go on with it: resume_from_checkpoint=true; or "
            "begin anew: --force."
        )
    for folder in steps.values() if first else ():
        shutil.rmtree(folder)  # else the next run would take them for its own
    return None


def _require_base(folder: Path, digest: str, sources: Sources) -> None:
    expected = read_settings(folder).base_digest
    if expected not in (None, digest):
        raise CheckpointError(
            f"{folder} was trained on a base of content digest {expected}, {sources.base} has {digest}: another base, though "
            "of the same shapes. Give the one it was trained on."
        )


def _finish(trainer: AdapterTrainer, out: Path) -> None:
    """The adapter at the top of the output: written beside, looked at, then put in place, its config last."""
    partial = out / ".adapter.partial"
    trainer.save_model(str(partial))
    if not trainer.args.should_save:
        return
    require_effect(partial)
    for file in sorted(partial.iterdir(), key=lambda p: p.name == CONFIG):
        file.replace(out / file.name)
    partial.rmdir()


def _write_record(
    result: Trained, recipe: Recipe, sources: Sources, data: Data, digest: str, history: list[dict[str, float]]
) -> None:
    """What was run, on what, and how it went."""
    packages = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes")
    record = {
        "cnq": __version__,
        "versions": {name: version(name) for name in packages if find_spec(name)},
        "recipe": recipe.model_dump(mode="json"),
        "base": {"path": str(sources.base), "content_sha256": digest, "rows": sources.rows, "new_rows": len(sources.new)},
        "data": asdict(data.counts),
        **asdict(replace(result, path=result.path.name, record=result.record.name)),  # type: ignore[arg-type]
        "history": history,
    }
    result.record.write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")
