"""Sizes as people write them."""

import pytest

from cnq.errors import CnqError
from cnq.files import byte_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("2GB", 2_000_000_000), ("500MB", 500_000_000), (" 4.2 gb ", 4_200_000_000), ("1.5GiB", 3 << 29),
     ("16kb", 16_000), ("3 KiB", 3072), ("0.1TB", 100_000_000_000), ("1TiB", 1 << 40), ("400MiB", 400 << 20)],
)  # fmt: skip
def test_sizes(text, size):
    assert byte_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "0", "0GB", "-1GB", "GB", "2XB", "2 G B", "1e9", "two", "1,5GB", "١GB", "0.0001KB", "9" * 99]
)
def test_what_is_no_size(text):
    with pytest.raises(CnqError, match=r"is no size\. Give bytes, or a number with KB, MB"):
        byte_size(text)
