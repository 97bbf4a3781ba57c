"""Meta's params.json: what it says must agree with the tensors, and what it leaves open is settled aloud."""

from pathlib import Path
from typing import Any

from ..archs.arch import Config
from ..errors import CheckpointError
from .hf import read_json

Params = dict[str, Any]
Shape = tuple[int, ...]

# rope scaling of LLaMA 3.1 (`apply_scaling` in Meta's llama3/model.py); factor of 3.2: config.json of its 1B and 3B
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_FACTORS = {False: 8.0, True: 32.0}  # whether the output is tied to the embedding, as in 3.2 alone
LLAMA3_THETA = 500000.0  # default of llama3/args.py

_MOST = {"n_layers": 512}  # llama.cpp's LLAMA_MAX_LAYERS


def read_params(path: Path) -> Params:
    """params.json of the directory, with the sizes that must stand in it. Raises CheckpointError."""
    file = path / "params.json"
    if not file.is_file():
        raise CheckpointError(
            f"{path} has consolidated.*.pth but no params.json, which says how many heads the tensors hold. "
            "Take it from the model's own download."
        )
    params = read_json(file)
    params = params.get("model", params)  # as LLaMA 3.1's download has it
    if not isinstance(params, dict):
        raise CheckpointError(f"{file}: model is {params!r}, expected an object. Download it again.")
    for key in ("dim", "n_layers", "n_heads", *(k for k in ("n_kv_heads", "multiple_of") if params.get(k) is not None)):
        most = _MOST.get(key, 2**31 - 1)
        if type(params.get(key)) is not int or not 1 <= params[key] <= most:
            raise _wrong(file, params, key, f"a whole number from 1 to {most}")
    for key in ("norm_eps", *(k for k in ("rope_theta", "ffn_dim_multiplier") if params.get(k) is not None)):
        if type(params.get(key)) not in (int, float) or not 0 < params[key] < 3.4e38:
            raise _wrong(file, params, key, "a number above 0")
    if params["dim"] % params["n_heads"]:
        raise _wrong(file, params, "n_heads", f"a divisor of dim, which is {params['dim']}")
    return params


def _wrong(file: Path, params: Params, key: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: {key} is {params.get(key)!r}, expected {expected}. Take params.json from the model's own download."
    )


def feed_forward(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """The size that Meta's FeedForward gives its hidden layer (model.py of LLaMA 1 to 3)."""
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * -(-hidden // multiple_of)


def config_of(path: Path, params: Params, shapes: dict[str, Shape], *, llama3: bool, tied: bool) -> tuple[Config, list[str]]:
    """config.json, and notes on what params.json left open.

    shapes: Meta's name -> shape of the whole tensor. llama3: whether the tokenizer is LLaMA 3's. tied: whether the output is
    the embedding again. Raises CheckpointError for sizes that the tensors contradict.
    """
    notes: list[str] = []
    dim, heads, scaled = params["dim"], params["n_heads"], bool(params.get("use_scaled_rope"))
    rows = shapes["tok_embeddings.weight"][0]
    if params.get("vocab_size") not in (None, -1, rows):
        notes.append(f"params.json says vocab_size {params['vocab_size']}, the embedding has {rows} rows: {rows} it is")
    config: Config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": dim,
        "intermediate_size": _intermediate_size(path, params, shapes["layers.0.feed_forward.w1.weight"][0]),
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": _kv_heads(path, params, shapes["layers.0.attention.wk.weight"][0], notes),
        "max_position_embeddings": _context(params, llama3, notes),
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": _theta(params, llama3, notes),
        "vocab_size": rows,
        "tie_word_embeddings": tied,
    }
    if scaled:
        factor = LLAMA3_FACTORS[tied]
        notes.append(
            f"params.json does not say by how much rope is scaled: {factor:g}, as LLaMA {'3.2' if tied else '3.1'}'s is"
        )
        config["rope_scaling"] = LLAMA3_SCALING | {"factor": factor}
    return config, notes


def _intermediate_size(path: Path, params: Params, found: int) -> int:
    if params.get("multiple_of"):
        said = feed_forward(params["dim"], params["multiple_of"], params.get("ffn_dim_multiplier"))
        if said != found:
            raise CheckpointError(
                f"{path}: feed_forward.w1 has {found} rows, by params.json (dim, multiple_of, ffn_dim_multiplier) it should "
                f"have {said}. Weights and params.json are of different models: get both from one place."
            )
    return found


def _kv_heads(path: Path, params: Params, found: int, notes: list[str]) -> int:
    """As the tensors have them: params.json written by others' merge scripts lack n_kv_heads even where it matters."""
    size = params["dim"] // params["n_heads"]
    said = params.get("n_kv_heads") or params["n_heads"]
    if found == said * size:
        return int(said)
    if params.get("n_kv_heads") or found % size or params["n_heads"] % (found // size):
        raise CheckpointError(
            f"{path}: attention.wk has {found} rows, by params.json (n_kv_heads {said}, heads of {size}) it should have "
            f"{said * size}. Weights and params.json are of different models: get both from one place."
        )
    notes.append(f"params.json does not say n_kv_heads: {found // size}, as attention.wk has {found} rows")
    return found // size


def _theta(params: Params, llama3: bool, notes: list[str]) -> float:
    if params.get("rope_theta") is None and llama3:
        notes.append(f"params.json does not say rope_theta: {LLAMA3_THETA:g}, as every LLaMA 3 has")
        return LLAMA3_THETA
    return float(params.get("rope_theta") or 10000.0)  # no such key before Code Llama


def _context(params: Params, llama3: bool, notes: list[str]) -> int:
    """Tokens of context: LLaMA 1 is told from 2 by norm_eps, but for its two largest, which 2 has not or has with GQA."""
    gqa = params.get("n_kv_heads") not in (None, params["n_heads"])
    if params.get("use_scaled_rope"):
        n, whose = 131072, "LLaMA 3.1"
    elif llama3:
        n, whose = 8192, "LLaMA 3"
    elif (params.get("rope_theta") or 0) > 10000:
        n, whose = 16384, "Code Llama"
    elif params["norm_eps"] < 1e-5 or params["dim"] == 6656 or (params["dim"] == 8192 and not gqa):
        n, whose = 2048, "LLaMA 1"
    else:
        n, whose = 4096, "LLaMA 2"
    notes.append(f"params.json does not say the length of the context: {n} tokens, as {whose} has")
    return n
