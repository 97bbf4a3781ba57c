"""Which pieces text is cut into: decided by the encoder, against every short text there is."""

from itertools import product

import spm
from hypothesis import given, settings
from hypothesis import strategies as st

from training.pieces import appended
from training.reachability import _cut, intermediates, unproduced, without_split

LETTERS = "ab中"
# Pieces of two to four letters with scores that tie now and then; the letters themselves are pieces.
VOCABULARY = st.dictionaries(st.text(LETTERS, min_size=2, max_size=4), st.integers(-4, 0).map(float), min_size=1, max_size=9)
EVERY_TEXT = ["".join(text) for n in range(1, 7) for text in product(LETTERS, repeat=n)]


def model(pieces):
    return spm.bpe({**pieces, **dict.fromkeys([*LETTERS, "▁"], -100.0)})


@settings(max_examples=60, deadline=None)
@given(pieces=VOCABULARY)
def test_unproduced_are_the_pieces_that_no_text_is_cut_into(pieces):
    made = model(pieces)
    seen = {piece for text in spm.encoder(made).encode(EVERY_TEXT, out_type=str) for piece in text}
    assert set(unproduced(made)) == set(pieces) - seen
    assert set(without_split(made, pieces)) <= set(unproduced(made))


@settings(max_examples=60, deadline=None)
@given(pieces=VOCABULARY)
def test_intermediates_let_every_piece_be_produced_and_only_ever_shorten(pieces):
    made = model(pieces)
    dead = unproduced(made)
    between = intermediates(made, dead)
    grown = appended(made, between)
    assert unproduced(grown) == []
    assert bool(between) == bool(dead)
    for before, after in zip(spm.encoder(made).encode(EVERY_TEXT), spm.encoder(grown).encode(EVERY_TEXT), strict=True):
        assert len(after) <= len(before)
    for spared in between:
        assert unproduced(appended(made, [text for text in between if text != spared])), f"{spared} is not needed"
    assert intermediates(made, dead) == between


@settings(max_examples=60, deadline=None)
@given(pieces=VOCABULARY)
def test_our_own_joining_is_sentencepiece_s(pieces):
    scores = {p.piece: p.score for p in model(pieces).pieces if p.type == 1}
    wall = "\ue000"
    cuts = spm.encoder(model(pieces)).encode([wall + text + wall for text in EVERY_TEXT], out_type=str)
    for text, cut in zip(EVERY_TEXT, cuts, strict=True):
        assert [p for p in cut if p != "▁" and not p.startswith("<0x")] == _cut(text, scores)


def test_one_piece_in_between_serves_many():
    made = model({})
    made = appended(made, [*"0123.", *(f"0.{n}" for n in range(4)), "越", "来", "多", "越来越", "越来越多"])
    assert unproduced(made) == ["0.0", "0.1", "0.2", "0.3", "越来越", "越来越多"]
    assert intermediates(made, unproduced(made)) == ["0.", "越来"]


def test_a_lost_race_is_told_from_a_missing_piece():
    """ "bc" joins before "ab" and "cd" can; in another order of scores "abcd" would be produced as it is."""
    made = spm.bpe({"bc": -1.0, "ab": -2.0, "cd": -3.0, "abcd": -4.0, "abcda": -5.0, **dict.fromkeys("abcd▁", -100.0)})
    assert unproduced(made) == ["abcd", "abcda"]
    assert without_split(made, ["abcd", "abcda"]) == []
    made = spm.bpe({"abcd": -1.0, "bc": -2.0, **dict.fromkeys("abcd▁", -100.0)})
    assert without_split(made, ["abcd", "bc"]) == ["abcd"]
