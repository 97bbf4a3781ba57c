"""Conversations for instruction tuning: tokenised, prompts masked, long ones fitted.

made = examples([Path("data/")], tokenizer, named("llama-2"), max_length=512, cache=Path("cache"))
Trainer(..., train_dataset=made.train, eval_dataset=made.held_out, data_collator=Padded())      # training/batches.py
Trainer(..., train_dataset=Packed(made.train, 512), data_collator=Flattened())
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from cnq import records
from cnq.errors import CorpusError, PromptError
from cnq.prompts import FORMATS, Format
from cnq.records import Record

from .conversation import Formatter
from .dialogues import Dialogues, read
from .encoding import Encoder
from .fitting import Fitting, TooLong
from .held_out import position, threshold
from .token_cache import Rows, cached, key, opened


@dataclass(frozen=True)
class ExampleCounts:
    """examples, tokens, learned: of training. cut: examples that lost something to max_length, answers_cut: of those, in an
    answer's end. dropped: conversations too long altogether. empty_answers, unanswered: conversations left out for an answer
    without text, or for want of one. held_out_tokens: those learned there, were it trained on; held_out_bytes: of UTF-8, what
    they stand for, special tokens not counted.
    """

    files: int
    examples: int
    tokens: int
    learned: int
    cut: int
    answers_cut: int
    dropped: int
    empty_answers: int
    unanswered: int
    held_out_examples: int
    held_out_tokens: int
    held_out_bytes: int


@dataclass(frozen=True)
class Examples:
    """train: rows of input_ids and labels, which are -100 where nothing is learned, and at the first token. held_out: the
    same with bytes, those that the labels stand for; None when nothing is held out."""

    train: Dataset
    held_out: Dataset | None
    counts: ExampleCounts


def examples(
    paths: Sequence[Path],
    tokenizer: Any,
    format: Format | str | None,
    *,
    max_length: int,
    too_long: TooLong = "cut",
    cache: Path,
    held_out: float = 0.01,
    seed: int = 0,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Examples:
    """Examples of the conversations in `paths`, files or folders of .json, .jsonl and .parquet.

    format: of the prompt, or a Jinja template; None = the tokenizer's own template. cache: as for `blocks`.
    held_out: share of the conversations not trained on, chosen by their first question and `seed`, at least one; 0 = none.
    too_long: see training/fitting.py. progress: called with the conversations tokenised, and of how many.

    Raises CorpusError (what cnq.records refuses, nothing to learn, options out of range), PromptError (no template, or one
    that refuses a conversation), CheckpointError (a slow tokenizer, or one without eos).
    """
    if max_length < 2 or not 0 <= held_out < 1:
        raise CorpusError(f"max_length is {max_length} and held_out {held_out}; expected 2 or more, and 0 to below 1.")
    files, encoder = records.files(paths, records.SUFFIXES), Encoder(tokenizer)
    jinja = _template(tokenizer, format)
    settings = {"format": jinja, "max_length": max_length, "too_long": too_long, "held_out": held_out, "seed": seed}
    folder = cache / f"examples-{key(files, encoder.digest(), settings)[:32]}"

    def make(new: Path) -> dict[str, Any]:
        found = read(files)
        fitting = Fitting(Formatter(encoder, jinja), max_length, too_long)
        return asdict(_write(new, found, fitting, _apart(found.items, held_out, seed), progress))

    counts = ExampleCounts(**cached(folder, make))
    return Examples(opened(folder / "train.arrow"), opened(folder / "held_out.arrow") if held_out else None, counts)


def _template(tokenizer: Any, format: Format | str | None) -> str:
    jinja = format.jinja if isinstance(format, Format) else format or tokenizer.chat_template
    if not isinstance(jinja, str):
        raise PromptError(f"{tokenizer.name_or_path} has no chat template. Name a prompt format: {', '.join(FORMATS)}.")
    return jinja


def _apart(items: Sequence[Record], share: float, seed: int) -> list[bool]:
    """Whether each is held out. Raises CorpusError when none is left."""
    positions = [position(_question(item), seed) for item in items]
    limit = threshold(lambda: positions, share)
    apart = [at < limit for at in positions]
    if all(apart):
        raise CorpusError(
            f"of {len(items)} conversations all would be held out, and none be left to train on. Give more, or held_out=0."
        )
    return apart


def _question(item: Record) -> str:
    """What it is known by: answers to one question stay together."""
    if item.text is not None:
        return item.text
    return next((m["content"] for m in item.messages if m["role"] == "user"), item.messages[0]["content"])


def _write(
    folder: Path, found: Dialogues, fitting: Fitting, apart: Sequence[bool], progress: Callable[[int, int], object]
) -> ExampleCounts:
    n: Counter[str] = Counter()
    train, held_out = (
        Rows(folder / "train.arrow", ["input_ids", "labels"]),
        Rows(folder / "held_out.arrow", ["input_ids", "labels", "bytes"]),
    )
    with train, held_out:
        for done, (fitted, away) in enumerate(zip(fitting.all(found.items), apart, strict=True), 1):
            progress(done, len(apart))
            n["cut"] += fitted.cut
            n["answers_cut"] += fitted.answer_cut
            n["dropped"] += not fitted.examples
            for tokens in fitted.examples:
                row = {"input_ids": tokens.input_ids, "labels": tokens.labels}
                if away:
                    held_out.add({**row, "bytes": tokens.nbytes})
                    n["held_out_tokens"] += tokens.learned
                    n["held_out_bytes"] += tokens.nbytes
                else:
                    train.add(row)
                    n["tokens"] += len(tokens)
                    n["learned"] += tokens.learned
    if not train.n:
        raise CorpusError(
            f"no example fits in {fitting.max_length} tokens: {n['dropped']} dropped. Raise max_length, or set too_long=cut."
        )
    names = ("tokens", "learned", "cut", "answers_cut", "dropped", "held_out_tokens", "held_out_bytes")
    return ExampleCounts(
        files=len(found.files), examples=train.n, held_out_examples=held_out.n, empty_answers=found.empty_answers,
        unanswered=found.unanswered, **{name: n[name] for name in names},
    )  # fmt: skip
