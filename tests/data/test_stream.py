"""Batches: every token once an epoch, the same bytes for a seed, exact positions; and the thread that draws ahead."""

import hashlib
import threading
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_transformer.data.stream import Batches, Prefetch, validation_sequences
from mlx_transformer.utils.errors import BadInput

TOKENS = np.arange(1000, dtype=np.uint16)


def take(batches, n: int) -> list[np.ndarray]:
    return [next(batches) for _ in range(n)]


@given(
    length=st.integers(2, 300), seq_len=st.integers(1, 40), batch_size=st.integers(1, 9), seed=st.integers(0, 2**64 - 1)
)
def test_an_epoch_predicts_every_token_once(length, seq_len, batch_size, seed):
    tokens = np.arange(length, dtype=np.uint16)
    if length < seq_len + 1:
        with pytest.raises(BadInput, match=f"{length} tokens, fewer than one sequence of {seq_len + 1}"):
            Batches(tokens, batch_size, seq_len, seed)
        return
    batches = Batches(tokens, batch_size, seq_len, seed)
    drawn = np.concatenate(take(batches, -(-2 * batches.sequences_per_epoch // batch_size)))
    assert drawn.dtype == np.int32
    assert (drawn == drawn[:, :1] + np.arange(seq_len + 1)).all()  # sequences are stretches of the text
    for epoch in (0, 1):
        targets = drawn[epoch * batches.sequences_per_epoch : (epoch + 1) * batches.sequences_per_epoch, 1:]
        assert sorted(targets.ravel()) == list(range(1, batches.sequences_per_epoch * seq_len + 1))


def test_batches_of_a_seed_never_change():
    drawn = np.stack(take(Batches(TOKENS, 7, 16, seed=5), 20)).astype("<i4")
    assert hashlib.sha256(drawn.tobytes()).hexdigest()[:16] == "b30bc44f27435451"


def test_seeds_and_epochs_have_orders_of_their_own():
    batches = Batches(TOKENS, 62, 16, seed=0)
    first, second = take(batches, 2)
    assert (batches.state()["epoch"], batches.state()["row"]) == (1, batches.sequences_per_epoch)
    assert (first != second).any()
    assert (first != next(Batches(TOKENS, 62, 16, seed=1))).any()
    assert (np.sort(first[:, 0]) != first[:, 0]).any()


@given(before=st.integers(0, 40), batch_size=st.integers(1, 70))
def test_a_restored_stream_goes_on_exactly(before, batch_size):
    batches = Batches(TOKENS, batch_size, 16, seed=3)
    take(batches, before)
    other = Batches(TOKENS, batch_size, 16, seed=3)
    other.restore(batches.state())
    assert other.state() == batches.state()
    np.testing.assert_array_equal(take(batches, 3), take(other, 3))


def test_a_position_of_another_stream_is_refused():
    state = Batches(TOKENS, 4, 16, seed=3).state()
    for other in (Batches(TOKENS, 4, 16, seed=4), Batches(TOKENS, 4, 8, seed=3)):
        with pytest.raises(BadInput, match="does not belong"):
            other.restore(state)


@given(length=st.integers(2, 200), seq_len=st.integers(1, 50))
def test_validation_sequences_predict_every_token_once(length, seq_len):
    valid = np.arange(7, 7 + length, dtype=np.uint16)
    sequences, mask = validation_sequences(valid, seq_len)
    assert sequences.shape == (len(mask), seq_len + 1)
    assert mask.dtype == bool
    np.testing.assert_array_equal(sequences[:, 1:][mask], valid[1:])
    np.testing.assert_array_equal(sequences[:, :-1][mask], valid[:-1])
    assert (sequences[:, 1:][~mask] == 7).all()
    assert (~mask).sum() < seq_len


def test_prefetched_batches_are_the_same_and_know_what_was_consumed():
    plain = Batches(TOKENS, 5, 16, seed=1)
    with closing(Prefetch(Batches(TOKENS, 5, 16, seed=1), depth=3)) as ahead:
        for _ in range(30):
            np.testing.assert_array_equal(next(ahead), next(plain))
            assert ahead.state() == plain.state()


def test_closing_leaves_no_thread_and_the_stream_where_it_was_consumed():
    threads = threading.active_count()
    batches = Batches(TOKENS, 5, 16, seed=1)
    ahead = Prefetch(batches)
    take(ahead, 3)
    state = ahead.state()
    ahead.close()
    ahead.close()
    assert threading.active_count() == threads
    assert batches.state() == state
    with pytest.raises(StopIteration):
        next(ahead)


def test_an_error_in_the_thread_is_raised_by_next():
    class Broken(Batches):
        def __next__(self):
            if self._sequence >= 10:
                raise OSError("the disk went away")
            return super().__next__()

    threads = threading.active_count()
    ahead = Prefetch(Broken(TOKENS, 5, 16))
    take(ahead, 2)
    with pytest.raises(OSError, match="the disk went away"):
        next(ahead)
    assert threading.active_count() == threads
