"""What a recipe starts from, looked at before any weight is loaded: base, tokenizer, adapter, and whether they go together."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from cnq import catalog
from cnq.adapters import read_adapter
from cnq.adapters.adapter import Adapter
from cnq.checkpoint import open_checkpoint
from cnq.checkpoint.digest import content_digest
from cnq.checkpoint.hf import has_weights
from cnq.checkpoint.meta import is_meta
from cnq.errors import CheckpointError, CnqError, RecipeError, VocabMismatch

from . import hf_tokenizer
from .embeddings import cut
from .pieces import read_model
from .recipe import EMBEDDINGS, Recipe


@dataclass(frozen=True)
class Sources:
    """base, tokenizer_folder, adapter: directories. config: transformers' of the base. rows: of its embedding.

    new: for each token that the tokenizer has beyond the base's rows, the old tokens its text is cut into; of an adapter with
    rows of its own these only make room for them.
    """

    base: Path
    config: Any
    rows: int
    tokenizer: Any
    tokenizer_folder: Path
    adapter: Path | None
    new: tuple[tuple[int, ...], ...] = ()


def find_sources(recipe: Recipe, say: Any = lambda text: None) -> Sources:
    """Find and check them; what is on the hub is downloaded.

    Raises CheckpointError (a GGUF, Meta's layout, a quantized base, a damaged one, an adapter of another base), VocabMismatch
    (the tokenizer is longer than the embedding and nobody asked for that, or is another model's), RecipeError, UnknownModel.
    """
    base = _base(recipe.base, say)
    adapter = _adapter(recipe.adapter, base, say) if recipe.adapter else None
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    if getattr(config, "quantization_config", None):
        raise CheckpointError(
            f"{base} is quantized ({_method(config)}). Train on the float checkpoint, with load_in_kbits=8 or 4."
        )
    checkpoint = open_checkpoint(base)
    checkpoint.placed()  # every tensor there, none unknown
    folder = Path(recipe.tokenizer) if recipe.tokenizer else adapter.tokenizer if adapter and adapter.tokenizer else base
    found = Sources(
        base=base,
        config=config,
        rows=int(checkpoint.config["vocab_size"]),
        tokenizer=load_tokenizer(folder),
        tokenizer_folder=folder,
        adapter=adapter.path if adapter else None,
    )
    own_rows = _rows_of(adapter) if adapter else None
    if own_rows is not None and own_rows > found.rows:
        if len(found.tokenizer) > own_rows:
            raise VocabMismatch(
                f"{folder} has {len(found.tokenizer)} tokens, the embeddings in {recipe.adapter} {own_rows} rows."
            )
        return replace(found, new=((0,),) * (own_rows - found.rows))
    return _with_new_rows(found, recipe)


def _base(name: str, say: Any) -> Path:
    entry = catalog.find(name)
    if entry.loras:
        raise CheckpointError(
            f"{name} is a base with {len(entry.loras)} adapters. Merge them first: python -m training.merge_lora {name} MERGED"
        )
    if entry.wheel or (entry.path and entry.path.is_file()):
        raise CheckpointError(
            f"{entry.path or name} is a GGUF, made for running, rounded for the most part. Train on the model's Hugging Face "
            f"directory; only where that is lost: cnq to-hf {entry.path or 'MODEL.gguf'} DIR, and train on DIR."
        )
    base = catalog.fetch(entry, Path("models") / entry.name / "source", say)
    if is_meta(base) and not has_weights(base):
        raise CheckpointError(f"{base} is in Meta's layout. First: python -m training.to_hf {base} HF_DIR")
    return base


def _adapter(name: str, base: Path, say: Any) -> Adapter:
    entry = catalog.with_loras(catalog.find(str(base)), [name])
    return read_adapter(catalog.fetch_loras(entry, Path("models"), say)[0])


def base_digest(sources: Sources, progress: Any = lambda done, total: None) -> str:
    """cnq's content digest of the base, which the adapter carries on: a second or two a gigabyte."""
    return content_digest(open_checkpoint(sources.base), progress)


def _rows_of(adapter: Adapter) -> int | None:
    """Of the embedding that an adapter brings."""
    return next((w[0].shape[0] for name, w in adapter.whole.items() if name.endswith("embed_tokens.weight")), None)


def _method(config: Any) -> str:
    quantization = config.quantization_config
    get = quantization.get if isinstance(quantization, dict) else partial(getattr, quantization)
    return str(get("quant_method", "unknown"))


def load_tokenizer(folder: Path) -> Any:
    """A directory's tokenizer, which cuts as SentencePiece and llama.cpp do.

    Of a tokenizer.model alone transformers takes the order of the pieces for their scores: where the new pieces of a Chinese
    vocabulary have score 0, it would cut otherwise. There tokenizer.json is made from the scores.
    Raises CheckpointError.
    """
    try:
        plain = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not (folder / "tokenizer.model").is_file() or (folder / "tokenizer.json").is_file():
            return plain
        with TemporaryDirectory() as scratch:
            hf_tokenizer.write(read_model(folder / "tokenizer.model"), Path(scratch), folder)
            tokenizer = AutoTokenizer.from_pretrained(scratch, trust_remote_code=False)
        added = sorted((id, token) for id, token in plain.added_tokens_decoder.items() if id >= len(tokenizer))
        for _, token in added:
            tokenizer.add_tokens([token], special_tokens=token.special)
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            if getattr(plain, name) and getattr(tokenizer, name) is None:
                setattr(tokenizer, name, getattr(plain, name))
        return tokenizer
    except CnqError:
        raise
    except Exception as error:  # of half a dozen libraries, which read files from anywhere
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CheckpointError(f"{folder}: its tokenizer could not be loaded: {reason}.") from error


def _with_new_rows(found: Sources, recipe: Recipe) -> Sources:
    more = len(found.tokenizer) - found.rows
    if recipe.tokenizer:
        _require_extension(found)
    if more <= 0:
        return found
    if not recipe.tokenizer:
        raise VocabMismatch(
            f"{found.tokenizer_folder} has {len(found.tokenizer)} tokens, the embedding of {found.base} {found.rows} rows. If "
            f"the {more} tokens are to be learned, say so: tokenizer={found.tokenizer_folder}. Else take the model's own."
        )
    if found.adapter:
        raise VocabMismatch(
            f"the tokenizer has {more} tokens that neither {found.base} nor {found.adapter} has rows for. Merge the adapter "
            "first (python -m training.merge_lora), and train a new one on the result."
        )
    if not set(EMBEDDINGS) <= set(recipe.whole):
        raise RecipeError(
            f"the tokenizer has {more} tokens that {found.base} has no rows for. They have to be trained whole: "
            f"lora.modules_to_save=[{', '.join(EMBEDDINGS)}]."
        )
    return replace(found, new=_parts(found))


def _require_extension(found: Sources) -> None:
    """The tokenizer begins with the base's own tokens."""
    own = load_tokenizer(found.base)
    n = min(len(own), found.rows)
    theirs, ours = (
        found.tokenizer.convert_ids_to_tokens(range(min(n, len(found.tokenizer)))),
        own.convert_ids_to_tokens(range(n)),
    )
    if theirs != ours:
        at = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), len(theirs))
        raise VocabMismatch(
            f"{found.tokenizer_folder} does not begin with the tokens of {found.base}: token {at} is "
            f"{theirs[at] if at < len(theirs) else 'missing'!r}, there {ours[at]!r}. Extend the model's own tokenizer: "
            "python -m training.merge_tokenizer."
        )


def _parts(found: Sources) -> tuple[tuple[int, ...], ...]:
    """The old tokens that each new one's text is cut into."""
    model, old = found.tokenizer_folder / "tokenizer.model", found.base / "tokenizer.model"
    new = range(found.rows, len(found.tokenizer))
    texts = found.tokenizer.convert_ids_to_tokens(new)
    if model.is_file() and old.is_file():
        return tuple(map(tuple, cut(read_model(old), texts)))
    own = load_tokenizer(found.base)
    plain = [found.tokenizer.convert_tokens_to_string([text]) for text in texts]
    unknown = own.unk_token_id if own.unk_token_id is not None else own.eos_token_id
    return tuple(tuple(own.encode(text, add_special_tokens=False)) or (unknown,) for text in plain)
