"""Counting n-grams: the sort that finds the distinct ones."""

import numpy as np
import pytest

from mlx_transformer.data.ngrams import _distinct


@pytest.mark.parametrize("largest", [1, 40, 1 << 40, 1 << 60])  # the last one has no room for a place beside it
def test_distinct_values_are_numpys(largest):
    values = np.random.default_rng(0).integers(0, largest, 1000)
    for ours, theirs in zip(_distinct(values), np.unique(values, return_inverse=True, return_counts=True), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [part.tolist() for part in _distinct(np.array([7]))] == [[7], [0], [1]]
