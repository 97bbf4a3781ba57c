"""Training a SentencePiece model whose pieces are meant for LLaMA's."""

import io
from collections.abc import Iterable, Iterator, Sequence

from sentencepiece import SentencePieceTrainer

from cnq.corpus import Source
from cnq.errors import CorpusError
from cnq.prompts import Message

from .pieces import Model

ALGORITHMS = ("bpe", "unigram")
_LONGEST = 1 << 20  # bytes of a line; SentencePiece leaves out longer ones, by default those above 4192


def train(sources: Sequence[Source], vocab_size: int, algorithm: str = "bpe") -> Model:
    """Train on the lines of the sources; the same text gives the same model.

    BPE's pieces are made of two others each, so in a merged BPE model all of them are produced; of a unigram model's, which
    were never meant to be joined pair by pair, a part is not.

    As in LLaMA, text is not normalized, and a digit is a piece by itself. No "▁" before a line: in a text there is one only
    at its beginning. No bytes: LLaMA has them.
    Raises CorpusError when the text does not yield that many pieces.
    """
    made = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_lines(sources),
            model_writer=made,
            model_type=algorithm,
            vocab_size=vocab_size,
            character_coverage=0.9995,
            byte_fallback=False,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=_LONGEST,
            num_threads=1,  # sums in another order would be other sums
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise CorpusError(
            f"no SentencePiece model of {vocab_size} pieces can be trained on this text ({_reason(error)}). "
            "Give more text, or another --vocab-size."
        ) from error
    model = Model()
    model.ParseFromString(made.getvalue())
    return model


def as_text(messages: list[Message]) -> str:
    """A conversation as text to count pieces in."""
    return "\n".join(m["content"] for m in messages)


def _lines(sources: Iterable[Source]) -> Iterator[str]:
    return (line for source in sources for document in source.documents for line in document.splitlines() if line)


def _reason(error: Exception) -> str:
    """What SentencePiece says, without the place in its source."""
    return str(error).rpartition("] ")[2].strip() or str(error).strip()
