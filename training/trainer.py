"""transformers' Trainer with what a long run must not lack: it stops at a loss that is no number, measures by the token, and
saves whole adapters, looked at after they are written."""

import json
from math import exp, isfinite, log
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from cnq.adapters.settings import BASE_DIGEST, CONFIG
from cnq.checkpoint.hf import copy_tokenizer
from cnq.errors import TrainingError

from .batches import Padded
from .model import explaining_memory, trained_tensors
from .recipe import Recipe
from .safety import require_saved

BAD_BATCH = "bad_batch.pt"


class AdapterTrainer(Trainer):
    """digest: the base's, which goes into adapter_config.json. tokenizer_folder: whose files go beside it.

    bytes_per_token: of the held-out text that is learned.
    """

    def __init__(self, *, recipe: Recipe, digest: str, tokenizer_folder: Path, bytes_per_token: float | None, **options: Any):
        super().__init__(**options)
        self.recipe, self.digest, self.tokenizer_folder = recipe, digest, tokenizer_folder
        self.bytes_per_token = bytes_per_token
        self._sums = torch.zeros(2, dtype=torch.float64)  # nats, tokens

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Raises TrainingError when the loss is no finite number, with the batch in a file, and when the memory is out."""
        with explaining_memory(self.recipe):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss).all():
            self._stop(loss, inputs)
        return loss

    def _stop(self, loss: torch.Tensor, inputs: dict[str, Any]) -> None:
        """Before the optimizer's step: the weights are still those of the last good one."""
        file = Path(str(self.args.output_dir)) / f"rank{self.args.process_index}-{BAD_BATCH}"
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = {name: value.cpu() if torch.is_tensor(value) else value for name, value in inputs.items()}
        torch.save({"step": self.state.global_step, "batch": kept}, file)
        raise TrainingError(
            f"the loss is {loss.item()} at step {self.state.global_step + 1}. The batch is in {file} (torch.load). "
            "Look at it; or lower learning_rate, set max_grad_norm, or dtype=bf16 instead of fp16; then go on from the last "
            "checkpoint: resume_from_checkpoint=true."
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Held-out examples are never packed: each is a row, so that what ranks see twice can be left out."""
        collator, self.data_collator = self.data_collator, Padded()
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, None, None]:
        """The loss of a batch, and its part of the sums over tokens, without the rows that only fill up the last batch."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")[:, 1:]
        with torch.no_grad(), self.compute_loss_context_manager(), explaining_memory(self.recipe):
            logits = model(**inputs).logits[:, :-1].float()
        nats = cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
        rows = torch.stack([nats, labels.ne(-100).sum(1)], 1)  # (rows, 2)
        self._sums += self.gather_function(rows).double().sum(0).cpu()
        return nats.sum() / labels.ne(-100).sum(), None, None

    def evaluation_loop(self, *args: Any, **options: Any) -> EvalLoopOutput:
        """The Trainer's, but its loss is the mean over all tokens, not over batches; with perplexity and bits per byte."""
        self._sums.zero_()
        output = super().evaluation_loop(*args, **options)
        nats, tokens = self._sums.tolist()
        loss = nats / tokens if tokens else float("nan")
        assert output.metrics is not None
        output.metrics.update(eval_loss=loss, eval_perplexity=exp(min(loss, 700)))
        if self.bytes_per_token:
            output.metrics["eval_bits_per_byte"] = loss / log(2) / self.bytes_per_token
        if not isfinite(loss):
            raise TrainingError(
                f"the held-out loss is {loss} at step {self.state.global_step}: training diverged, or the data is."
            )
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter, its tokenizer, and whose base it is; then the file is read again and compared.

        Under ZeRO the parameters come together one at a time, on the rank that writes.
        Raises TrainingError when what is in the file is not what was trained.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        tensors = trained_tensors(self.model, keep=self.args.should_save)
        if not self.args.should_save:
            return
        # PEFT filters the tensors by itself. A new vocabulary's rows are trained whole, so that no embedding is to be added.
        assert self.model is not None
        self.model.save_pretrained(folder, state_dict=tensors, save_embedding_layers=False)
        config = folder / CONFIG
        settings = json.loads(config.read_text(encoding="utf-8")) | {BASE_DIGEST: self.digest}
        config.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
        copy_tokenizer(self.tokenizer_folder, folder)  # as it is: what the tokenizer says of itself must not change on the way
        require_saved(folder, tensors)
