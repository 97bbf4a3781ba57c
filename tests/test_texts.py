"""The texts that come with an installation: two languages, nothing twice, and no text both to calibrate and to measure on."""

import sys

import pytest

from cnq.corpus import peoples_daily
from cnq.errors import CorpusError
from cnq.texts import calibration_texts, licences, python_reference, reviews, unlike_texts


def share_of_chinese(source) -> float:
    text = "".join(source.documents)
    return sum("一" <= c <= "鿿" for c in text) / len(text)


def test_calibration_is_half_chinese_half_english():
    chinese, *english = calibration_texts()
    assert chinese.weight == sum(source.weight for source in english)
    assert sorted(chinese.documents) == sorted(peoples_daily("calibration").documents)
    assert share_of_chinese(chinese) > 0.7
    for source in english:
        assert share_of_chinese(source) < 0.01
        assert sum(map(len, source.documents)) > 150_000
    assert calibration_texts() == [chinese, *english]


def test_held_out_pages_are_none_of_calibrations():
    assert not set(python_reference("held-out").documents) & set(python_reference("calibration").documents)
    assert python_reference("held-out").documents


def test_measuring_is_on_other_texts_each_once():
    one, two = unlike_texts()
    assert share_of_chinese(one) > 0.7
    assert share_of_chinese(two) < 0.001
    for source in (one, two):
        assert len(set(source.documents)) == len(source.documents)
        assert sum(map(len, source.documents)) > 80_000
    known = {d for source in calibration_texts() for d in source.documents}
    assert not known & {*one.documents, *two.documents}
    assert (reviews(), licences()) == (one, two)


def test_what_is_not_installed_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(CorpusError, match="pydoc_data"):
        python_reference("calibration")
    monkeypatch.setattr("cnq.texts._LICENSED", ("no-such-package",))
    with pytest.raises(CorpusError, match="no licences"):
        licences()
