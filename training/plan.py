"""What a recipe is going to do, before it does it: parameters that are trained, memory, steps and tokens."""

from dataclasses import dataclass
from math import ceil
from typing import Any

import peft
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from .model import lora_config, n_parameters
from .recipe import Pretraining, Recipe

# Bytes a number, of what an optimizer keeps besides the weights: two float32 moments, or two of 8 bits with their scales.
_STATES = {"adamw_8bit": 2.03, "adamw_bnb_8bit": 2.03, "paged_adamw_8bit": 2.03, "sgd": 0.0, "adafactor": 0.01}
_ADAMW = 8.0


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, estimated. Offloaded parts are in the machine's memory: `host`."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    host: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Plan:
    """steps: of the optimizer; None = not known before. tokens: that one step sees, padding included."""

    parameters: int
    trained: int
    memory: Memory
    tokens_per_step: int
    steps: int | None
    world: int


def plan(recipe: Recipe, config: Any, rows: int, examples: int | None, world: int) -> Plan:
    """config: transformers' of the base. rows: of the embedding, new ones included. examples: to learn from. world: processes.

    The model is built without weights. Raises CheckpointError when the recipe names layers that it does not have.
    """
    base, trained, whole = _counts(recipe, config, rows)
    batch, accumulated = recipe.argument("per_device_train_batch_size"), recipe.argument("gradient_accumulation_steps")
    length = recipe.block_size if isinstance(recipe, Pretraining) else recipe.max_length  # type: ignore[attr-defined]
    steps = recipe.argument("max_steps")
    if steps <= 0 and examples is not None:
        steps = ceil(recipe.argument("num_train_epochs") * ceil(ceil(examples / (batch * world)) / accumulated))
    return Plan(
        parameters=base + trained - whole,
        trained=trained,
        memory=memory(recipe, config, base, trained, whole, batch, length, world),
        tokens_per_step=batch * accumulated * length * world,
        steps=steps if steps > 0 else None,
        world=world,
    )


def _counts(recipe: Recipe, config: Any, rows: int) -> tuple[int, int, int]:
    """Parameters of the base; trained ones; those of them that are whole modules, of which the base keeps its own."""
    config = type(config).from_dict({**config.to_dict(), "vocab_size": rows})
    with torch.device("meta"):
        # Not from_config, which under ZeRO-3 shares parameters out.
        model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)  # type: ignore[operator]
        base = n_parameters(model.parameters())
        model = peft.get_peft_model(model, lora_config(recipe, bool(config.tie_word_embeddings)))
    sizes = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    return base, sum(n for _, n in sizes), sum(n for name, n in sizes if ".modules_to_save." in name)


def memory(recipe: Recipe, config: Any, base: int, trained: int, whole: int, batch: int, length: int, world: int = 1) -> Memory:
    """An estimate for one GPU, in bytes. b: bytes of a number in the recipe's dtype (2; fp32: 4).

    weights: b a base parameter; with 8 bits 1 a matrix element, with 4 (nf4, double quantization) 0.516 = 4 bits + 8 of a scale
    a block of 64 + 32 of a scale of 256 scales; embedding and head stay float32 there (prepare_model_for_kbit_training). And 4
    a trained one (float32), with DeepSpeed b.
    gradients: 4 a trained parameter, with DeepSpeed b.
    optimizer: AdamW two float32 moments, 8 a trained parameter (bitsandbytes' 8-bit ones 2); with DeepSpeed 4 more, its float32
    copy. ZeRO-2 shares out gradients and optimizer among the GPUs, ZeRO-3 weights as well; offload moves them to the host.
    activations, with checkpointed layers: b · batch · length · hidden a layer for what is kept, one layer's inside while it is
    recomputed, b · batch · length · (16 hidden + 4 intermediate), and the logits, of which the loss makes two float32 copies,
    10 · batch · length · vocabulary. Without checkpointing every layer's inside is kept. With eager attention a layer's inside
    has 3 · b · batch · heads · length² more.
    Source of the counts: Korthikanti et al. 2022, arXiv:2205.05198, section 4, less what SDPA and flash attention never store.
    Not counted: CUDA itself (about 0.5 GB), fragmentation, buffers of the collectives (about 1 GB with the configs here).
    """
    b = 4 if recipe.dtype == "fp32" else 2
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    matrix = {16: float(b), 8: 1.0, 4: 0.516}[recipe.load_in_kbits]
    rest = float(b) if recipe.load_in_kbits == 16 else 4.0
    zero = recipe.deepspeed or ""
    kept = b if zero else 4
    weights = (base - embeddings) * matrix + embeddings * rest + trained * kept
    gradients = trained * float(kept)
    optimizer = trained * (_STATES.get(str(recipe.argument("optim")), _ADAMW) + (4 if zero else 0))
    tokens = batch * length
    inside = b * tokens * (16 * config.hidden_size + 4 * config.intermediate_size)
    if recipe.attention == "eager":
        inside += 3 * b * tokens * length * config.num_attention_heads
    layers = config.num_hidden_layers
    checkpointed = recipe.gradient_checkpointing
    activations = (b * tokens * config.hidden_size * layers + inside) if checkpointed else inside * layers
    activations += 10 * tokens * config.vocab_size
    share = world if zero else 1
    host = 0.0
    if "zero3" in zero:
        weights /= share
    gradients, optimizer = gradients / share, optimizer / share
    if "offload" in zero:
        host = optimizer + (weights if "zero3" in zero else 0)
        optimizer, weights = 0.0, (0.0 if "zero3" in zero else weights)
    return Memory(weights, gradients, optimizer, activations, host * world)
