"""LoRA adapters: reading them, and merging them into a base as its tensors are read."""

from .adapter import Adapter, LowRank, read_adapter
from .merge import Effect, Merge, merge

__all__ = ["Adapter", "Effect", "LowRank", "Merge", "merge", "read_adapter"]
