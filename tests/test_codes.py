"""Blocks taken apart and put together, against ggml's own decoder."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnq.engine import codes, rows
from cnq.engine.codes import Scales
from cnq.errors import QuantizeError
from cnq.gguf_file import TYPE_BY_NAME

NAMES = [
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS",
]  # fmt: skip
COLUMNS = 512
HALVES = st.one_of(st.sampled_from([0.0, -0.0, 6e-8, 65504.0, -65504.0, 1.0]), st.floats(-8, 8, width=16))


def blocks(name: str, seed: int, d: float, dmin: float) -> np.ndarray:
    """Three rows of random bytes, with these numbers as the scales of the first, and random ones in the others."""
    random = np.random.default_rng(seed)
    form = codes.form(TYPE_BY_NAME[name])
    data = random.integers(0, 256, (3, form.type.row_bytes(COLUMNS)), np.uint8)
    found = form.scales(data)
    halves = [None if part is None else random.normal(0, 4, part.shape).astype(np.float16) for part in (found.d, found.dmin)]
    halves[0][0] = d
    if halves[1] is not None:
        halves[1][0] = dmin
    form.put_scales(data, replace(found, d=halves[0], dmin=halves[1]))
    return data


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), d=HALVES, dmin=HALVES)
def test_parts_are_what_ggml_decodes_bit_for_bit(name, seed, d, dmin):
    data = blocks(name, seed, d, dmin)
    form = codes.form(TYPE_BY_NAME[name])
    decoded = rows.decode(data, form.type, np.empty(3 * COLUMNS, np.float32))
    found = form.scales(data)
    steps, offsets = found.steps(), found.offsets()
    products = np.repeat(steps, form.group, 1) * form.levels[form.codes(data)]
    if offsets is None:
        assert np.array_equal(products, decoded)
        return
    offsets = np.repeat(offsets, form.group, 1)
    # A compiler may fuse product and sum into one rounding, here in float64, which holds the product exactly.
    fused = np.repeat(steps, form.group, 1).astype(np.float64) * form.levels[form.codes(data)] + offsets
    assert np.array_equal(products + offsets, decoded) or np.array_equal(fused.astype(np.float32), decoded)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_bytes_come_back_from_their_parts(name, seed):
    data = blocks(name, seed, 1, 1)
    form = codes.form(TYPE_BY_NAME[name])
    again = np.zeros_like(data)
    form.put_codes(again, form.codes(data))
    form.put_scales(again, form.scales(data))
    assert np.array_equal(again, data)


@pytest.mark.parametrize("name", NAMES)
def test_every_code_can_be_put_everywhere(name):
    form = codes.form(TYPE_BY_NAME[name])
    data = blocks(name, 0, 1, 1)
    for code in range(len(form.levels)):
        wanted = np.full((3, COLUMNS), code, np.uint8)
        wanted[:, ::3] = (code + 5) % len(form.levels)
        before = form.scales(data)
        form.put_codes(data, wanted)
        assert np.array_equal(form.codes(data), wanted)
        after = form.scales(data)
        for part in Scales.__dataclass_fields__:
            assert np.array_equal(getattr(before, part), getattr(after, part))


@pytest.mark.parametrize("name", ["IQ1_S", "IQ2_XXS", "IQ3_S", "TQ1_0", "F16"])
def test_types_with_codes_of_groups_are_refused_by_name(name):
    assert not codes.can_change(TYPE_BY_NAME[name])
    with pytest.raises(QuantizeError, match=name):
        codes.form(TYPE_BY_NAME[name])
