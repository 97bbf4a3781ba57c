"""Safety nets of a long run: saved adapters are looked at, SIGTERM saves, and the model shows what it says by now."""

import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from cnq.adapters import read_adapter
from cnq.errors import CheckpointError, TrainingError, listed

from .model import saved_name

WEIGHTS = "adapter_model.safetensors"
Say = Callable[[str], object]


def require_saved(folder: Path, trained: Mapping[str, torch.Tensor]) -> None:
    """Raise TrainingError unless the adapter's file holds every trained tensor, bit by bit, and each of them is finite."""
    file = folder / WEIGHTS
    saved = load_file(file) if file.is_file() else {}
    expected = {saved_name(name): tensor for name, tensor in trained.items()}
    nbytes = file.stat().st_size if file.is_file() else 0
    if missing := sorted(expected.keys() - saved.keys()):
        raise TrainingError(
            f"{file} ({nbytes} bytes) holds {len(saved)} tensors, {len(expected)} were trained: {listed(missing, 2)} are not "
            "in it. It was not saved whole; the run stops before it costs more. The checkpoint before it is still there."
        )
    for name, tensor in expected.items():
        if saved[name].shape != tensor.shape or not torch.equal(saved[name].view(torch.uint8), tensor.view(torch.uint8)):
            raise TrainingError(
                f"{file}: {name} is {tuple(saved[name].shape)} {saved[name].dtype}, not the {tuple(tensor.shape)} "
                f"{tensor.dtype} that was trained. Look at the disk; the checkpoint before it is still there."
            )
        if not torch.isfinite(tensor).all():
            raise TrainingError(
                f"{name} holds numbers that are not finite: training diverged. Go on from an earlier checkpoint in "
                f"{folder.parent} with a lower learning_rate."
            )


def require_effect(folder: Path) -> None:
    """Raise TrainingError unless a finished adapter changes each layer that it was made for, as merging demands."""
    try:
        read_adapter(folder)
    except CheckpointError as error:
        raise TrainingError(f"{error} Was learning_rate 0, or were there too few steps?") from error


class StopOnSignal(TrainerCallback):
    """SIGTERM, as a cluster sends it before the time is up: the step is finished, a checkpoint saved, the run ends.

    All ranks stop at the same step, whichever the signal came to.
    """

    def __init__(self) -> None:
        self.asked = self.stopped = False
        self._before: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._before = signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        asked = torch.tensor(float(self.asked), device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        if asked:
            self.stopped = True
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        signal.signal(signal.SIGTERM, self._before)


class Board(TensorBoardCallback):
    """TensorBoard's log, and what the model says: at each evaluation it goes on with some prompts, by the likeliest tokens.

    prompts: what is shown of them -> their tokens. said: step -> prompt -> answer. say: hears them too.
    """

    def __init__(
        self, folder: Path, prompts: Mapping[str, Sequence[int]], tokenizer: Any, n_tokens: int, dtype: torch.dtype, say: Say
    ):
        super().__init__()
        self.logging_dir = str(folder)
        self.prompts, self.tokenizer, self.n_tokens, self.dtype, self.say = prompts, tokenizer, n_tokens, dtype, say
        self.said: dict[int, dict[str, str]] = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_log |= state.global_step >= state.max_steps  # the last loss is the one that is asked for

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        training = model.training
        model.eval()
        # Every rank answers: under ZeRO-3 each has a part of the weights.
        answers = {text: self._answer(model, ids, args.device) for text, ids in self.prompts.items()}
        model.train(training)
        self.said[state.global_step] = answers
        for text, answer in answers.items():
            self.say(f"step {state.global_step}, {text!r}: {answer!r}")
            if self.tb_writer:
                self.tb_writer.add_text(f"samples/{text[:40]}", answer, state.global_step)

    def _answer(self, model: Any, ids: Sequence[int], device: torch.device) -> str:
        prompt = torch.tensor([list(ids)], device=device)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        mixed = torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)
        with torch.no_grad(), mixed:  # what is trained is float32, the base may not be
            out = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=self.n_tokens, do_sample=False,
                temperature=None, top_p=None, top_k=None, pad_token_id=pad,
            )  # fmt: skip
        return str(self.tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True))
