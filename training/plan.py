"""What a recipe is going to do, before it does it: parameters that are trained, memory, steps and tokens."""

from dataclasses import dataclass
from math import ceil
from typing import Any

import peft
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from cnq.errors import RecipeError

from .model import n_parameters
from .recipe import LINEAR, Recipe

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


def plan(recipe: Recipe, config: Any, lora: peft.LoraConfig, rows: int, examples: int | None, world: int) -> Plan:
    """config: transformers' of the base. lora: of the adapter. rows: of the embedding, new ones included.
    examples: to learn from; None = not known. world: processes.

    The model is built without weights. Raises RecipeError when the recipe names layers that it does not have.
    """
    base, trained, whole = _counts(config, lora, rows)
    batch, accumulated = recipe.argument("per_device_train_batch_size"), recipe.argument("gradient_accumulation_steps")
    steps = recipe.argument("max_steps")
    if steps <= 0 and examples is not None:
        steps = ceil(recipe.argument("num_train_epochs") * ceil(ceil(examples / (batch * world)) / accumulated))
    config = type(config).from_dict({**config.to_dict(), "vocab_size": rows})
    return Plan(
        parameters=base + trained - whole,
        trained=trained,
        memory=memory(recipe, config, lora, base, trained, world),
        tokens_per_step=batch * accumulated * recipe.length * world,
        steps=steps if steps > 0 else None,
        world=world,
    )


def _counts(config: Any, lora: peft.LoraConfig, rows: int) -> tuple[int, int, int]:
    """Parameters of the base; trained ones; those of them that are whole modules, of which the base keeps its own."""
    config = type(config).from_dict({**config.to_dict(), "vocab_size": rows})
    with torch.device("meta"):
        # Not from_config, which under ZeRO-3 shares parameters out.
        model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)  # type: ignore[operator]
        base = n_parameters(model.parameters())
        try:
            model = peft.get_peft_model(model, lora)
        except ValueError as error:
            raise RecipeError(
                f"lora: {str(error).splitlines()[0].rstrip('.')}. Name layers of the model, as q_proj."
            ) from error
    sizes = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    return base, sum(n for _, n in sizes), sum(n for name, n in sizes if ".modules_to_save." in name)


def memory(recipe: Recipe, config: Any, lora: peft.LoraConfig, base: int, trained: int, world: int = 1) -> Memory:
    """An estimate for one GPU, in bytes. base, trained: parameters. b: bytes of a number in the recipe's dtype (2; fp32: 4).

    weights: b a base parameter; with 8 bits 1 a matrix element, with 4 (nf4, double quantization) 0.516 = 4 bits + 8 of a scale
    a block of 64 + 32 of a scale of 256 scales; embedding and head stay float32 there (prepare_model_for_kbit_training). And 4
    a trained one (float32), with DeepSpeed b.
    gradients: 4 a trained parameter, with DeepSpeed b.
    optimizer: AdamW two float32 moments, 8 a trained parameter (bitsandbytes' 8-bit ones 2); with DeepSpeed 4 more, its float32
    copy. ZeRO-2 shares out gradients and optimizer among the GPUs, ZeRO-3 weights as well; offload moves them to the host.
    activations: what the backward pass needs of a layer, b · tokens · (8 hidden + 3 intermediate) (in fp32, where nothing is
    cast, 6 hidden) + (b + 4) · tokens · inputs of the layers with LoRA, whose dropout keeps a copy; with checkpointed layers
    that once, and b · tokens · hidden of each.
    Eager attention keeps 3 · b · batch · heads · length² more. Of the logits, in b and twice in float32, (b + 8) · tokens ·
    vocabulary. tests/training/test_plan.py counts what autograd really keeps.
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
    share = world if zero else 1
    gradients, optimizer = gradients / share, optimizer / share
    weights /= share if "zero3" in zero else 1
    host = 0.0
    if "offload" in zero:
        host, optimizer = optimizer, 0.0
        if "zero3" in zero:
            host, weights = host + weights, 0.0
    return Memory(weights, gradients, optimizer, activations(recipe, config, lora), host * world)


def activations(recipe: Recipe, config: Any, lora: peft.LoraConfig) -> float:
    """See memory."""
    b = 4 if recipe.dtype == "fp32" else 2
    batch = recipe.argument("per_device_train_batch_size")
    tokens = batch * recipe.length
    hidden, wide, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    inside = b * tokens * ((6 if b == 4 else 8) * hidden + 3 * wide)
    if lora.lora_dropout:
        inputs = {name: wide if name == "down_proj" else hidden for name in LINEAR}
        targets = inputs if lora.target_modules == "all-linear" else lora.target_modules or ()
        inside += (b + 4) * tokens * sum(inputs.get(name, 0) for name in targets)
    if recipe.attention == "eager":
        inside += 3 * b * tokens * recipe.length * config.num_attention_heads
    through = b * tokens * hidden * layers + inside if recipe.gradient_checkpointing else inside * layers
    return float(through + (b + 8) * tokens * config.vocab_size)
