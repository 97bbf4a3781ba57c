"""Random 2-layer checkpoints of every family, with tokenizers trained on a few sentences: no download, no torch.

The same arguments give the same bytes: golden manifests depend on it.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
from safetensors import TensorSpec, serialize_file

from cnq.archs import of_config

SENTENCES = [
    "人工智能正在改变我们的生活方式，也在改变语言本身。",
    "量化把一个大模型变小，让它在普通的电脑上运行。",
    "北京的秋天，天空很蓝，空气里有一点点凉意。",
    "The quick brown fox jumps over the lazy dog; it's 1024 times faster than before.",
    "A language model predicts the next token from the tokens before it.",
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n",
    "我想在 apple 工作 1314151 天～ 中文，English，混排。",
    "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。",
]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# family -> what its config.json says otherwise than LLaMA's
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "yi": {"architectures": ["YiForCausalLM"], "model_type": "Yi", "rope_theta": 5000000.0},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": None},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
    "internlm2": {"architectures": ["InternLM2ForCausalLM"], "bias": False, "rope_theta": 1000000.0},
    "baichuan-7b": {"architectures": ["BaiChuanForCausalLM"], "model_type": "baichuan", "num_hidden_layers": 32},
    "baichuan-13b": {"architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", "num_hidden_layers": 40,
                     "model_max_length": 512},
    "baichuan2-7b": {"architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", "num_hidden_layers": 32,
                     "model_max_length": 512, "z_loss_weight": 0},
}  # fmt: skip
# What the config.json of the family does not say
_ABSENT = {"baichuan-7b": ("num_key_value_heads", "rope_theta"), "baichuan2-7b": ("num_key_value_heads", "rope_theta"),
           "baichuan-13b": ("num_key_value_heads", "rope_theta", "max_position_embeddings")}  # fmt: skip
# vocab -> user-defined symbols of its tokenizer.model
_SYMBOLS = {
    "spm-symbols": ["<|im_start|>", "<|im_end|>", "▁▁"],
    "spm-unused": ["[UNUSED_TOKEN_0]", "[UNUSED_TOKEN_1]", "[UNUSED_TOKEN_2]"],
}
_GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def checkpoint(
    folder: Path, family: str = "llama", *, vocab: str = "spm", dtype: str = "F16", shards: int = 1, **config: Any
) -> Path:
    """Write a checkpoint to `folder`, named as the model; config.json's keys can be overridden.

    vocab: spm (tokenizer.model), spm-added (with added tokens), spm-json (tokenizer.json only), spm-symbols (special tokens
    are user-defined symbols of the tokenizer.model, as Yi's), spm-unused (special tokens take the place of unused ones, as
    InternLM2's), or the name of a pre-tokenizer for byte-level BPE.
    """
    folder.mkdir(parents=True, exist_ok=True)
    n_vocab = tokenizer(folder, vocab)
    settings = {
        "model_type": family,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": n_vocab,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **_FAMILIES[family],
        **config,
    }
    settings = {key: value for key, value in settings.items() if key not in _ABSENT.get(family, ())}
    (folder / "config.json").write_text(json.dumps(settings))
    weights(folder, settings, dtype, shards)
    return folder


def weights(folder: Path, config: dict[str, Any], dtype: str, shards: int = 1) -> None:
    tensors = {name: values(name, shape) for name, shape in of_config(config).expected(config).items()}
    files: dict[str, dict[str, np.ndarray]] = {}
    for i, (name, value) in enumerate(tensors.items()):
        file = "model.safetensors" if shards == 1 else f"model-{i * shards // len(tensors) + 1:05}-of-{shards:05}.safetensors"
        files.setdefault(file, {})[name] = value
    for file, content in files.items():
        save(folder / file, content, dtype)
    if shards > 1:
        index = {"metadata": {}, "weight_map": {name: file for file, content in files.items() for name in content}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Normal numbers of a size that keeps activations near 1; norms near 1. Each tensor has its own seed."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    numbers = random.standard_normal(shape, dtype=np.float32)
    return 1 + 0.1 * numbers if name.endswith("norm.weight") else numbers * np.float32(shape[-1] ** -0.5)


def save(path: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    """Write float32 tensors as safetensors of F32, F16 or BF16 (rounded to nearest even)."""
    raw = {}
    for name, value in tensors.items():
        if dtype == "BF16":
            bits = value.astype(np.float32).view(np.uint32)
            raw[name] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        else:
            raw[name] = np.ascontiguousarray(value, np.float32 if dtype == "F32" else np.float16)
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    specs = {
        name: TensorSpec(dtype=names[dtype], shape=list(a.shape), data_ptr=a.ctypes.data, data_len=a.nbytes)
        for name, a in raw.items()
    }
    serialize_file(specs, path, metadata={"format": "pt"})


def tokenizer(folder: Path, vocab: str) -> int:
    """Write a tokenizer's files; returns the number of its tokens."""
    if vocab.startswith("spm"):
        return _sentencepiece(folder, vocab)
    return _byte_level(folder, vocab)


def _sentencepiece(folder: Path, vocab: str) -> int:
    model = folder / "tokenizer.model"
    bos, eos = ("<|startoftext|>", "<|endoftext|>") if vocab == "spm-symbols" else ("<s>", "</s>")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=420,
        byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False,
        num_threads=1, minloglevel=2, bos_piece=bos, eos_piece=eos, add_dummy_prefix=vocab != "spm-symbols",
        user_defined_symbols=_SYMBOLS.get(vocab, []),
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    config: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": bos, "eos_token": eos, "unk_token": "<unk>",
        "add_bos_token": vocab != "spm-symbols", "add_eos_token": False, "legacy": True,
    }  # fmt: skip
    n = 420
    if vocab == "spm-added":
        added = ["<unk>", "<s>", "</s>"], ["[PAD]", "<|im_start|>", "<|im_end|>", "量化"]
        config["added_tokens_decoder"] = _decoder(added[0]) | _decoder(added[1], n)
        config["pad_token"] = "[PAD]"
        config["chat_template"] = CHATML
        n += len(added[1])
    if vocab == "spm-unused":
        config["added_tokens_decoder"] = _decoder(["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"])
        config["chat_template"] = CHATML
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False))
    if vocab == "spm-json":
        _hf_fast(model, folder / "tokenizer.json")
        model.unlink()
    return n


def _decoder(tokens: list[str], first: int = 0) -> dict[str, dict[str, Any]]:
    """added_tokens_decoder for tokens from id `first` on; those in brackets are special."""
    flags = {"normalized": False, "lstrip": False, "rstrip": False}
    return {str(first + i): {"content": t, "special": t[0] in "<["} | flags for i, t in enumerate(tokens)}


def _hf_fast(model: Path, path: Path) -> None:
    """tokenizer.json as transformers converts a LLaMA tokenizer.model: merges in the order of the scores."""
    pieces = sentencepiece.SentencePieceProcessor(str(model))
    ids = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    scores = {piece: pieces.get_score(i) for piece, i in ids.items()}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted((p for p in ids if len(p) > 1 and not p.startswith("<")), key=lambda p: (-scores[p], ids[p]))
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    special = [
        {
            "id": i,
            "content": t,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, t in enumerate(("<unk>", "<s>", "</s>"))
    ]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": None,
        "post_processor": {"type": "TemplateProcessing", "single": [bos, text],
                           "pair": [bos, text, bos, {"Sequence": {"id": "B", "type_id": 1}}],
                           "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": ids, "merges": [f"{a} {b}" for a, b in merges]},
    }  # fmt: skip
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _byte_level(folder: Path, pre: str) -> int:
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
    tokenizer.pre_tokenizer = pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    from tokenizers import pre_tokenizers

    tokenizer.train_from_iterator(
        SENTENCES * 3,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )  # fmt: skip
    if pre in ("llama-bpe", "tekken"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", pair="<|im_start|> $A <|im_start|> $B", special_tokens=[("<|im_start|>", 1)]
        )
    tokenizer.add_tokens(["量化模型"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "chat_template": CHATML,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def pre_tokenizer(name: str) -> Any:
    """The pre-tokenizer that llama.cpp calls `name`, as it stands in the tokenizer.json files of its models."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    from cnq.vocab import bpe

    bytes_only = ByteLevel(add_prefix_space=False, use_regex=False)
    by_itself = ByteLevel(add_prefix_space=False, use_regex=True)
    match name:
        case "gpt-2":
            return by_itself
        case "smollm":
            return Sequence([Digits(individual_digits=True), by_itself])
        case "llama-bpe" | "smaug-bpe":
            return Sequence([Split(Regex(_GPT4.replace("DIGITS", "{1,3}")), "isolated"), bytes_only])
        case "qwen2":
            return Sequence([Split(Regex(_GPT4.replace("DIGITS", "")), "isolated"), bytes_only])
        case "tekken":
            return Sequence([Split(Regex(bpe._TEKKEN), "isolated"), bytes_only])
        case "deepseek-v3":
            return Sequence([*(Split(Regex(cut), "isolated") for cut in bpe._DEEPSEEK_V3), bytes_only])
        case "deepseek-llm":
            cuts = [Split(Regex(cut), "isolated") for cut in bpe._DEEPSEEK_LLM]
            return Sequence([*cuts, Digits(individual_digits=False), bytes_only])
        case "deepseek-coder":
            cuts = [Split(Regex(cut), "isolated") for cut in ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")]
            return Sequence([*cuts, Digits(individual_digits=True), bytes_only])
    raise ValueError(name)


def moe_gguf(path: Path, experts: int = 4, used: int = 2) -> Path:
    """A mixture-of-experts GGUF of the llama family, from the tiny dense model's sizes."""
    random = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"block_count": 1, "context_length": 256, "embedding_length": 64, "feed_forward_length": 96,
                       "attention.head_count": 4, "attention.head_count_kv": 2, "vocab_size": 32, "rope.dimension_count": 16,
                       "expert_count": experts, "expert_used_count": used}.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(29))])
    writer.add_token_scores([0.0] * 32)
    writer.add_token_types([2, 3, 3, *([1] * 29)])
    shapes = {"token_embd": (32, 64), "output_norm": (64,), "output": (32, 64),
              "blk.0.attn_norm": (64,), "blk.0.attn_q": (64, 64),
              "blk.0.attn_k": (32, 64), "blk.0.attn_v": (32, 64), "blk.0.attn_output": (64, 64), "blk.0.ffn_norm": (64,),
              "blk.0.ffn_gate_inp": (experts, 64), "blk.0.ffn_gate_exps": (experts, 96, 64),
              "blk.0.ffn_up_exps": (experts, 96, 64), "blk.0.ffn_down_exps": (experts, 64, 96)}  # fmt: skip
    for name, shape in shapes.items():
        data = random.standard_normal(shape).astype(np.float32) * (1 if len(shape) == 1 else shape[-1] ** -0.5)
        writer.add_tensor(f"{name}.weight", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
