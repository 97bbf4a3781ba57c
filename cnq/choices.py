"""Multiple-choice examinations (C-Eval, CMMLU): the likeliest of A to D as the next token.

Folders as those benchmarks publish them: val/<subject>_val.csv or test/<subject>.csv with id, question, A, B, C, D, answer;
dev/ holds the worked examples for 5-shot. Prompt: C-Eval's (github.com/hkust-nlp/ceval). Scoring as ymcui/Chinese-LLaMA-Alpaca
scripts/ceval does it with constrained decoding: each letter counts in every spelling that the tokenizer has after the colon.
"""

import csv
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .engine.model import Model
from .errors import CorpusError

LETTERS = "ABCD"
_SUFFIXES = ("_val", "_test", "_dev")


@dataclass(frozen=True)
class Question:
    text: str
    options: tuple[str, str, str, str]
    answer: str


@dataclass(frozen=True)
class Subject:
    """One examination's result. truncated: questions whose examples had to be left out to fit the context."""

    name: str
    n: int
    right: int
    truncated: int


@dataclass(frozen=True)
class Choices:
    """accuracy, error: percent over all questions, and its standard error. average: over the subjects, as C-Eval ranks."""

    path: Path
    shots: int
    subjects: tuple[Subject, ...]
    accuracy: float
    error: float
    average: float
    seconds: float


def score_choices(
    gguf: Path,
    folder: Path,
    *,
    shots: int = 0,
    limit: int | None = None,
    n_ctx: int = 4096,
    threads: int = 0,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Choices:
    """Sit the examinations in `folder`. shots: worked examples before each question. limit: questions a subject.

    Raises CorpusError (no examinations, a file that is none, examples missing), GgufError, EngineError.
    """
    started = time.perf_counter()
    exams = {subject: questions[:limit] for subject, questions in _read_all(folder).items()}
    examples = {subject: _examples(folder, subject, shots) for subject in exams}
    total, done = sum(map(len, exams.values())), 0
    results = []
    with Model(gguf, n_ctx=n_ctx, n_threads=threads) as model:
        letters = [_spellings(model, letter) for letter in LETTERS]
        for subject, questions in exams.items():
            right = truncated = 0
            for question in questions:
                tokens, cut = _prompt(model, subject, examples[subject], question)
                logits = model.next_logits(tokens)
                scores = [np.logaddexp.reduce(logits[ids]) for ids in letters]
                right += LETTERS[int(np.argmax(scores))] == question.answer
                truncated += cut
                done += 1
                progress(done, total)
            results.append(Subject(subject, len(questions), right, truncated))
    p = sum(s.right for s in results) / total
    return Choices(
        path=gguf,
        shots=shots,
        subjects=tuple(results),
        accuracy=100 * p,
        error=100 * float(np.sqrt(p * (1 - p) / max(1, total - 1))),
        average=100 * float(np.mean([s.right / s.n for s in results])),
        seconds=time.perf_counter() - started,
    )


def _spellings(model: Model, letter: str) -> list[int]:
    """The tokens that may stand for a letter after the prompt's colon."""
    texts = (letter, f" {letter}", f"：{letter}")
    return sorted({model.tokenize(text, add_special=False, parse_special=False)[-1] for text in texts})


def _prompt(model: Model, subject: str, examples: list[Question], question: Question) -> tuple[list[int], bool]:
    """The tokens, and whether examples were left out: from the first on, until the rest fits."""
    head = f"以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n"
    for start in range(len(examples) + 1):
        shown = "".join(f"{_asked(e)}{e.answer}\n\n" for e in examples[start:])
        tokens = model.prompt(head + shown + _asked(question), parse_special=False)
        if len(tokens) < model.n_ctx:
            return tokens, start > 0
    raise CorpusError(f"{subject}: a question of {len(tokens)} tokens does not fit the context of {model.n_ctx}. Raise --ctx.")


def _asked(question: Question) -> str:
    options = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, question.options, strict=True))
    return f"{question.text}{options}\n答案："


def _read_all(folder: Path) -> dict[str, list[Question]]:
    for part in ("val", "test", "."):
        files = sorted((folder / part).glob("*.csv"))
        if files:
            return {_subject(path): _read(path) for path in files}
    raise CorpusError(f"{folder} holds no examinations: expected val/*.csv (C-Eval) or test/*.csv (CMMLU).")


def _subject(path: Path) -> str:
    name = path.stem
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def _examples(folder: Path, subject: str, shots: int) -> list[Question]:
    if not shots:
        return []
    for name in (f"{subject}_dev.csv", f"{subject}.csv"):
        if (path := folder / "dev" / name).is_file():
            found = _read(path)
            if len(found) < shots:
                raise CorpusError(f"{path} has {len(found)} examples, {shots} are asked for.")
            return found[:shots]
    raise CorpusError(f"{folder / 'dev'} has no examples for {subject}, which --shots {shots} needs.")


def _read(path: Path) -> list[Question]:
    """A CSV with question, A, B, C, D and answer, whatever their case and order."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as f:
            rows = [
                {(k or "").strip().lower(): (v or "") for k, v in row.items() if isinstance(v, str)}
                for row in csv.DictReader(f)
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CorpusError(f"{path} cannot be read as CSV in UTF-8: {error}.") from None
    questions = []
    for number, row in enumerate(rows, 2):
        answer = row.get("answer", "").strip().upper()
        if "question" not in row or any(x.lower() not in row for x in LETTERS) or answer not in tuple(LETTERS):
            raise CorpusError(
                f"{path}, line {number}: expected question, A, B, C, D and an answer from A to D, found {sorted(row)} "
                f"with answer {answer!r}. Test files without answers cannot be scored here: use val/."
            )
        questions.append(Question(row["question"].strip(), (row["a"], row["b"], row["c"], row["d"]), answer))
    if not questions:
        raise CorpusError(f"{path} holds no questions.")
    return questions
