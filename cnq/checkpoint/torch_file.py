"""PyTorch's files of weights (.bin, .pth): a pickle with the tensors behind it, of which nothing but tensors is accepted."""

from functools import partial
from pathlib import Path

from ..archs.arch import DROPPED
from ..errors import CheckpointError
from ..gguf_file import Tensor
from .checkpoint import Entry, Weights, float_type, typed

_MOST_TOUCHED = 128 << 20  # bytes of a mapping that are read before it is made anew: what was read counts as ours until then


def read_torch(path: Path) -> Weights:
    """The tensors of a file, memory-mapped unless it is older than torch 1.6. Raises CheckpointError.

    Those that no conversion takes over (DROPPED) are passed off as F32, whatever they are.
    """
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path} is a PyTorch file, which takes torch to read: pip install 'cnq[training]'. "
            "Or use the model's safetensors files, which need nothing."
        ) from None

    def plain(value: object) -> bool:
        """A tensor with all its numbers in the file: a stride of 0 can make any size out of one."""
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            return False
        return value.numel() * value.element_size() <= value.untyped_storage().nbytes()

    load = partial(torch.load, path, map_location="cpu", weights_only=True)
    mapped = True
    try:
        try:
            state = load(mmap=True)
        except RuntimeError:  # saved before torch 1.6: not a zip, cannot be mapped
            mapped = False
            state = load()
    except Exception as error:  # torch raises half a dozen kinds for a damaged or hostile pickle
        # what was found comes after the advice to switch the protection off
        reason = (str(error).rpartition("WeightsUnpickler error: ")[2].splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} is damaged, or not plain weights ({reason}). Use the model's safetensors files, or download it again."
        ) from None
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    if not isinstance(state, dict) or (odd := [k for k, v in state.items() if not (isinstance(k, str) and plain(v))]):
        found = f"{odd[0]!r} is no tensor" if isinstance(state, dict) else f"it holds a {type(state).__name__}"
        raise CheckpointError(
            f"{path} is not plain weights: {found}, expected names and tensors. Use the model that save_pretrained wrote."
        )

    touched = 0

    def read(name: str, entry: Entry) -> Tensor:
        nonlocal state, touched
        if mapped and touched > _MOST_TOUCHED:
            state, touched = load(mmap=True), 0
        touched += entry.nbytes
        raw = state[name].detach().contiguous().view(-1).view(torch.uint8).numpy()
        return Tensor(name, entry.type, entry.shape, typed(raw, entry.type, entry.shape))

    weights: Weights = {}
    for name, tensor in state.items():
        dtype = "F32" if name.endswith(DROPPED) else kinds.get(tensor.dtype, str(tensor.dtype))
        entry = Entry(float_type(path, name, dtype), tuple(tensor.shape))
        weights[name] = entry, partial(read, name, entry)
    return weights
