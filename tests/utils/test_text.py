"""Counts and their nouns."""

import pytest

from mlx_transformer.utils.text import plural


@pytest.mark.parametrize(
    ("count", "noun", "written"),
    [
        (0, "document", "0 documents"),
        (1, "document", "1 document"),
        (2000, "validation document", "2,000 validation documents"),
        (1, "story", "1 story"),
        (3, "story", "3 stories"),
        (2, "day", "2 days"),
    ],
)
def test_a_noun_follows_its_count(count, noun, written):
    assert plural(count, noun) == written
