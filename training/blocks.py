"""Text for pre-training: documents, tokenised and packed into blocks.

    made = blocks([Path("corpus/")], tokenizer, block_size=1024, cache=Path("cache"))
    Trainer(..., train_dataset=made.train, eval_dataset=made.held_out, data_collator=Padded())      # training/batches.py

A document is a line (as the recipes for Chinese-LLaMA have it; blank lines are none), a paragraph (lines up to a blank one) or
a whole file. Each is bos, where the tokenizer puts one, its tokens, and eos. Documents follow each other and are cut into
blocks of block_size tokens, of which the last may be shorter. Special tokens that a text spells out are text.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value

from cnq import records
from cnq.errors import CorpusError

from .batches import UNLEARNED
from .documents import Corpus, Kind, survey
from .encoding import Encoder, batches, bytes_of
from .token_cache import Rows, cached, key, opened

SUFFIXES = (".txt",)
_REPORTED = 1000  # documents between two reports


@dataclass(frozen=True)
class BlockCounts:
    """documents, nbytes (of UTF-8), tokens and blocks are those of training; tokens and blocks of a stream are not known: None.

    held_out_tokens: those predicted. held_out_bytes: what they stand for.
    """

    files: int
    documents: int
    nbytes: int
    tokens: int | None
    blocks: int | None
    held_out_documents: int
    held_out_blocks: int
    held_out_tokens: int
    held_out_bytes: int


@dataclass(frozen=True)
class Blocks:
    """train: rows of input_ids, all learned. held_out: rows of input_ids, labels and bytes; None when nothing is held out.

    labels are -100 at bos and eos, and at the first token, which nothing predicts; bytes are the UTF-8 bytes of text that the
    other labels stand for. Bits per byte = all rows' summed losses / ln 2 / the sum of their bytes.
    """

    train: Dataset | IterableDataset
    held_out: Dataset | None
    counts: BlockCounts


def blocks(
    paths: Sequence[Path],
    tokenizer: Any,
    *,
    block_size: int,
    cache: Path,
    held_out: float = 0.01,
    seed: int = 0,
    documents: Kind = "line",
    streaming: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Blocks:
    """Blocks of the *.txt files in `paths`, files or folders.

    cache: folder for what was tokenised, used again as long as files, tokenizer and options are the same.
    held_out: share of the documents not trained on, chosen by their text and `seed`, at least one; 0 = none.
    streaming: train is read and tokenised as it is used, in the memory of a few documents: the same blocks in the same order.
    progress: called with the documents tokenised, and of how many.

    Raises CorpusError (no files, no text, an encoding other than UTF-8, too few documents to hold one out, options out of
    range), CheckpointError (a slow tokenizer, or one without eos).
    """
    if block_size < 2 or not 0 <= held_out < 1:
        raise CorpusError(f"block_size is {block_size} and held_out {held_out}; expected 2 or more, and 0 to below 1.")
    files, encoder = records.files(paths, SUFFIXES), Encoder(tokenizer)
    settings = {"block_size": block_size, "held_out": held_out, "seed": seed, "documents": documents, "streaming": streaming}
    folder = cache / f"blocks-{key(files, encoder.digest(), settings)[:32]}"

    def make(new: Path) -> dict[str, Any]:
        found = survey(files, documents, held_out, seed)
        corpus = Corpus(tuple(files), documents, seed, found.threshold)
        n_tokens, n_blocks = None, None
        if not streaming:
            texts = _reported(corpus.texts(held_out=False), progress, found.documents)
            n_tokens, n_blocks = _write_train(new / "train.arrow", texts, encoder, block_size)
        kept = _write_held_out(new / "held_out.arrow", corpus, encoder, block_size)
        counts = BlockCounts(len(files), found.documents, found.nbytes, n_tokens, n_blocks, found.held_out_documents, *kept)
        return {"threshold": found.threshold, "counts": asdict(counts)}

    made = cached(folder, make)
    corpus = Corpus(tuple(files), documents, seed, made["threshold"])
    return Blocks(
        _stream(corpus, tokenizer, block_size) if streaming else opened(folder / "train.arrow"),
        opened(folder / "held_out.arrow") if held_out else None,
        BlockCounts(**made["counts"]),
    )


def _reported(texts: Iterable[str], progress: Callable[[int, int], object], total: int) -> Iterator[str]:
    for done, text in enumerate(texts):
        if done % _REPORTED == 0:
            progress(done, total)
        yield text
    progress(total, total)


def _write_train(path: Path, texts: Iterable[str], encoder: Encoder, block_size: int) -> tuple[int, int]:
    """Returns how many tokens and blocks."""
    tokens = 0
    with Rows(path, ["input_ids"]) as rows:
        for ids in _train_blocks(texts, encoder, block_size):
            rows.add({"input_ids": ids})
            tokens += len(ids)
    return tokens, rows.n


def _write_held_out(path: Path, corpus: Corpus, encoder: Encoder, block_size: int) -> tuple[int, int, int]:
    """Returns how many blocks, predicted tokens, and bytes."""
    tokens = nbytes = 0
    with Rows(path, ["input_ids", "labels", "bytes"]) as rows:
        for ids, labels, sizes in _cut(_held_out_documents(corpus, encoder), block_size):
            labels[0] = UNLEARNED
            if learned := sum(label != UNLEARNED for label in labels):
                rows.add({"input_ids": ids, "labels": labels, "bytes": sum(sizes[1:])})
                tokens, nbytes = tokens + learned, nbytes + sum(sizes[1:])
    return rows.n, tokens, nbytes


def _train_blocks(texts: Iterable[str], encoder: Encoder, block_size: int) -> Iterator[list[int]]:
    documents = ((encoder.bos + ids + [encoder.eos],) for ids in encoder.ids(texts))
    return (ids for (ids,) in _cut(documents, block_size))


def _held_out_documents(corpus: Corpus, encoder: Encoder) -> Iterator[tuple[list[int], ...]]:
    """input_ids, labels and bytes of each."""
    front = [UNLEARNED] * len(encoder.bos)
    for batch in batches(corpus.texts(held_out=True)):
        for text, encoded in zip(batch, encoder.encode(batch, special=False), strict=True):
            ids, sizes = encoded.ids, bytes_of(text, encoded)
            yield encoder.bos + ids + [encoder.eos], [*front, *ids, UNLEARNED], [*(0 for _ in front), *sizes, 0]


def _cut(documents: Iterable[tuple[list[int], ...]], size: int) -> Iterator[tuple[list[int], ...]]:
    """Join documents, each of lists of one length, and cut them into pieces of `size`; the last may be shorter.

    A last piece of a single token is left out: it would predict nothing.
    """
    left: tuple[list[int], ...] = ()
    for document in documents:
        left = tuple(a + b for a, b in zip(left, document, strict=True)) if left else document
        whole = len(left[0]) // size * size
        for start in range(0, whole, size):
            yield tuple(part[start : start + size] for part in left)
        left = tuple(part[whole:] for part in left)
    if left and len(left[0]) > 1:
        yield left


def _stream(corpus: Corpus, tokenizer: Any, block_size: int) -> IterableDataset:
    features = Features({"input_ids": List(Value("int32"))})
    source = {"corpus": corpus, "tokenizer": tokenizer, "block_size": block_size}
    return IterableDataset.from_generator(_streamed, features=features, gen_kwargs=source)


def _streamed(corpus: Corpus, tokenizer: Any, block_size: int) -> Iterator[dict[str, Any]]:
    for ids in _train_blocks(corpus.texts(held_out=False), Encoder(tokenizer), block_size):
        yield {"input_ids": ids}
