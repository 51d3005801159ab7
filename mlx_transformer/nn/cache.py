"""Caches for decoding: made by mixers, one per depth, advanced by the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

EMPTY_POSITION = 2**30  # position of an empty slot: later than any query, hence hidden by causality
_UNLIMITED = 2**30  # free slots of a cache that never grows
_STEP = 16  # a full buffer grows by at least 16 slots: few, since attention computes over empty slots as well
_SHARE = 8  # and by 1 / 8 of its slots: rarely, since a step is compiled for each shape


class LayerCache(Protocol):
    """State of one mixer. `arrays` can be read and replaced, so that a compiled step can return them."""

    arrays: dict[str, mx.array]
    free_slots: int  # lower bound of the tokens that fit before a shape changes; kept on the host

    def select(self, sequences: mx.array) -> None:
        """Keep the sequences of these batch indices, in this order (beam search)."""

    def reserve(self, tokens: int) -> None:
        """Allocate slots for this many further tokens, so that no shape changes meanwhile."""

    def compact(self, tokens: int) -> None:
        """Free the slots that no sequence uses; tokens is the length of the longest one."""

    def merged(self, others: Sequence[LayerCache]) -> LayerCache:
        """Return one cache with the sequences of this one, then those of the others."""


class KVCache:
    """Keys and values (B, H, C, d) of the tokens so far in a buffer of C slots, with the position of each slot.

    An empty slot has EMPTY_POSITION. Slot and position differ: merged sequences of unequal length share slots.
    """

    def __init__(self) -> None:
        self.arrays: dict[str, mx.array] = {}
        self.free_slots = 0

    def update(self, k: mx.array, v: mx.array, positions: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Append k and v (B, H, L, d) at positions (L,) or (B, L); return all keys, values and positions."""
        length = k.shape[2]
        if not self.arrays:
            self._start(k, v, positions)
        if not length:
            return self.arrays["k"], self.arrays["v"], self.arrays["positions"]
        if self.free_slots < length:
            self.reserve(length)
        held, start = self.arrays, self.arrays["used"]
        held["k"] = mx.slice_update(held["k"], k, start, axes=(2,))
        held["v"] = mx.slice_update(held["v"], v, start, axes=(2,))
        positions = mx.broadcast_to(positions, (*held["positions"].shape[:-1], length)).astype(mx.int32)
        held["positions"] = mx.slice_update(held["positions"], positions, start, axes=(held["positions"].ndim - 1,))
        held["used"] = start + length
        self.free_slots -= length
        return held["k"], held["v"], held["positions"]

    def _start(self, k: mx.array, v: mx.array, positions: mx.array) -> None:
        self.arrays = {
            "k": mx.zeros((*k.shape[:2], 0, k.shape[3]), k.dtype),
            "v": mx.zeros((*v.shape[:2], 0, v.shape[3]), v.dtype),
            "positions": mx.zeros((*positions.shape[:-1], 0), mx.int32),
            "used": mx.array([0]),
        }

    def reserve(self, tokens: int) -> None:
        """Grow the buffer until this many further tokens fit; does nothing while the cache is empty."""
        if self.free_slots >= tokens or not self.arrays:
            return
        more = -(-max(tokens - self.free_slots, self.arrays["k"].shape[2] // _SHARE) // _STEP) * _STEP
        for name, axis, filler in (("k", 2, 0), ("v", 2, 0), ("positions", -1, EMPTY_POSITION)):
            held = self.arrays[name]
            shape = list(held.shape)
            shape[axis] = more
            self.arrays[name] = mx.concatenate([held, mx.full(shape, filler, held.dtype)], axis=axis)
        self.free_slots += more

    def select(self, sequences: mx.array) -> None:
        """Keep the sequences of these batch indices (R,) int, in this order."""
        for name, held in self.arrays.items():
            if name != "used" and held.ndim > 1:
                self.arrays[name] = held[sequences]

    def compact(self, tokens: int) -> None:
        """Move the tokens of every sequence to the first slots, in order; needs positions (B, C)."""
        slots = -(-tokens // _STEP) * _STEP
        order = mx.argsort(self.arrays["positions"], axis=-1)[:, :slots]
        for name in ("k", "v"):
            held = self.arrays[name]
            index = mx.broadcast_to(order[:, None, :, None], (*held.shape[:2], slots, held.shape[3]))
            self.arrays[name] = mx.take_along_axis(held, index, axis=2)
        self.arrays["positions"] = mx.take_along_axis(self.arrays["positions"], order, axis=-1)
        self.arrays["used"] = mx.array([tokens])
        self.free_slots = slots - tokens

    def merged(self, others: Sequence[LayerCache]) -> KVCache:
        """Return one cache with the sequences of all, padded to the longest buffer; positions are kept."""
        parts = [cache.arrays for cache in (self, *others)]
        slots = max(part["k"].shape[2] for part in parts)
        whole = KVCache()
        whole.arrays = {
            "k": mx.concatenate([_pad_slots(part["k"], 2, slots, 0) for part in parts]),
            "v": mx.concatenate([_pad_slots(part["v"], 2, slots, 0) for part in parts]),
            "positions": mx.concatenate([_pad_slots(_positions(part), 1, slots, EMPTY_POSITION) for part in parts]),
            "used": mx.array([slots]),  # the next token of every sequence goes to the slot after the longest buffer
        }
        return whole


class State:
    """Recurrent state: named arrays whose first axis is the batch."""

    def __init__(self, **arrays: mx.array) -> None:
        self.arrays = arrays
        self.free_slots = _UNLIMITED

    def select(self, sequences: mx.array) -> None:
        """Keep the sequences of these batch indices (R,) int, in this order."""
        self.arrays = {name: held[sequences] for name, held in self.arrays.items()}

    def reserve(self, tokens: int) -> None:
        """Do nothing: a state does not grow."""

    def compact(self, tokens: int) -> None:
        """Do nothing: every slot is in use."""

    def merged(self, others: Sequence[LayerCache]) -> State:
        """Return one state with the sequences of all."""
        return State(
            **{name: mx.concatenate([held, *(o.arrays[name] for o in others)]) for name, held in self.arrays.items()}
        )


class WindowCache(State):
    """Keys and values of the last `window` tokens, in order, and of the first `n_global` positions of each sequence.

    It never grows. An empty slot has EMPTY_POSITION; each sequence has its own positions.
    """

    def __init__(self, window: int, n_global: int) -> None:
        super().__init__()
        self.window, self.n_global = window, n_global

    def update(self, k: mx.array, v: mx.array, positions: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Append k and v (B, H, L, d) at positions (L,) or (B, L); return keys, values and positions (B, C).

        C = n_global + window + L: the global tokens, the window before the update, the new tokens. In the latter two
        a global token has EMPTY_POSITION, so that no key counts twice.
        """
        positions = mx.broadcast_to(positions, (k.shape[0], k.shape[2])).astype(mx.int32)[:, None, :, None]
        new = {"k": k, "v": v, "positions": positions}
        held = self.arrays or self._empty(new)
        seen = {name: mx.concatenate([held[name], x], axis=2) for name, x in new.items()}
        self.arrays = {name: x[:, :, -self.window :] for name, x in seen.items()}
        if self.n_global:
            first = self._first(new, held)
            self.arrays |= {f"first_{name}": x for name, x in first.items()}
            seen["positions"] = mx.where(seen["positions"] < self.n_global, EMPTY_POSITION, seen["positions"])
            seen = {name: mx.concatenate([first[name], x], axis=2) for name, x in seen.items()}
        return seen["k"], seen["v"], seen["positions"][:, 0, :, 0]

    def _first(self, new: dict[str, mx.array], held: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return the global tokens, updated with those among the new tokens."""
        is_global = new["positions"] == mx.arange(self.n_global)  # (B, 1, L, n_global)
        is_new, index = is_global.any(axis=2)[..., None], mx.argmax(is_global, axis=2)[..., None]
        first = {}
        for name, x in new.items():
            before = held[f"first_{name}"]
            first[name] = mx.where(is_new, mx.take_along_axis(x, mx.broadcast_to(index, before.shape), axis=2), before)
        return first

    def _empty(self, new: dict[str, mx.array]) -> dict[str, mx.array]:
        arrays = {}
        for name, x in new.items():
            for prefix, slots in (("", self.window), ("first_", self.n_global)):
                if slots:
                    shape = (*x.shape[:2], slots, x.shape[3])
                    arrays[prefix + name] = mx.full(shape, EMPTY_POSITION if name == "positions" else 0, x.dtype)
        return arrays

    def merged(self, others: Sequence[LayerCache]) -> WindowCache:
        """Return one cache with the sequences of all; every WindowCache has the same number of slots."""
        whole = WindowCache(self.window, self.n_global)
        whole.arrays = super().merged(others).arrays
        return whole


class SummaryCache(WindowCache):
    """Keys and values of the last `window` tokens, and of the last `n_summary` tokens of each block of `window` ones.

    The slot of a summary follows from its position, so sequences of unequal length share slots; one that is not filled
    stands for a position later than any query. Needs consecutive positions.
    """

    def __init__(self, window: int, n_summary: int) -> None:
        super().__init__(window, 0)
        self.n_summary, self.free_slots = n_summary, 0

    def update(self, k: mx.array, v: mx.array, positions: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Append k and v (B, H, L, d) at positions (L,) or (B, L); return keys, values and positions (B, C).

        C = summaries + window + L: the slots of summaries, the window before the update, the new tokens. In the latter
        two a summary has EMPTY_POSITION, so that no key counts twice.
        """
        positions = mx.broadcast_to(positions, (k.shape[0], k.shape[2]))
        if not self.arrays:
            empty = {f"summary_{name}": mx.zeros((*x.shape[:2], 0, x.shape[3]), x.dtype) for name, x in _pairs(k, v)}
            self.arrays = (
                self._empty({"k": k, "v": v, "positions": positions.astype(mx.int32)[:, None, :, None]}) | empty
            )
        if self.free_slots < k.shape[2]:
            self.reserve(k.shape[2])
        self.free_slots -= k.shape[2]
        slots = self._slot_positions()
        summaries = {f"summary_{name}": self._summaries(name, x, slots, positions) for name, x in _pairs(k, v)}
        k, v, k_pos = super().update(k, v, positions)
        self.arrays |= summaries
        k_pos = mx.where(k_pos % self.window >= self.window - self.n_summary, EMPTY_POSITION, k_pos)
        return (
            mx.concatenate([summaries["summary_k"], k], axis=2),
            mx.concatenate([summaries["summary_v"], v], axis=2),
            mx.concatenate([mx.broadcast_to(slots, (len(k_pos), slots.size)), k_pos], axis=1),
        )

    def _slot_positions(self) -> mx.array:
        """Return the position that each slot of a summary stands for."""
        slots = mx.arange(self.arrays["summary_k"].shape[2])
        return (slots // self.n_summary + 1) * self.window - self.n_summary + slots % self.n_summary

    def _summaries(self, name: str, x: mx.array, slots: mx.array, positions: mx.array) -> mx.array:
        """Return the summaries, updated with those among the new tokens x (B, H, L, d)."""
        held = self.arrays[f"summary_{name}"]
        index = slots - positions[:, :1]  # (B, slots)
        is_new = (index >= 0) & (index < x.shape[2])
        index = mx.broadcast_to(mx.where(is_new, index, 0)[:, None, :, None], held.shape)
        return mx.where(is_new[:, None, :, None], mx.take_along_axis(x, index, axis=2), held)

    def reserve(self, tokens: int) -> None:
        """Grow the summaries until this many further tokens fit; does nothing while the cache is empty."""
        if self.free_slots >= tokens or not self.arrays:
            return
        needed = -(-(tokens - self.free_slots) // self.window)  # blocks
        slots = self.arrays["summary_k"].shape[2]
        blocks = max(needed, -(-max(_STEP, slots // _SHARE) // self.n_summary))
        self._pad(slots + blocks * self.n_summary)

    def _pad(self, slots: int) -> None:
        self.free_slots += (slots - self.arrays["summary_k"].shape[2]) // self.n_summary * self.window
        for name in ("summary_k", "summary_v"):
            self.arrays[name] = _pad_slots(self.arrays[name], 2, slots, 0)

    def compact(self, tokens: int) -> None:
        """Drop the summaries' slots beyond those of `tokens` tokens."""
        blocks = -(-tokens // self.window)
        for name in ("summary_k", "summary_v"):
            self.arrays[name] = self.arrays[name][:, :, : blocks * self.n_summary]
        self.free_slots = blocks * self.window - tokens

    def merged(self, others: Sequence[LayerCache]) -> SummaryCache:
        """Return one cache with the sequences of all, padded to the most summaries."""
        caches = [cache._copy() for cache in (self, *others) if isinstance(cache, SummaryCache)]
        slots = max(cache.arrays["summary_k"].shape[2] for cache in caches)
        for cache in caches:
            cache._pad(slots)
        whole = caches[0]
        whole.arrays = State.merged(whole, caches[1:]).arrays
        whole.free_slots = min(cache.free_slots for cache in caches)
        return whole

    def _copy(self) -> SummaryCache:
        result = SummaryCache(self.window, self.n_summary)
        result.arrays, result.free_slots = dict(self.arrays), self.free_slots
        return result


class Cache:
    """Cache of a model for decoding: one LayerCache per depth, and the number of cached tokens."""

    def __init__(self, layers: Sequence[LayerCache]) -> None:
        self.layers = list(layers)
        self.offset = mx.array(0)  # cached tokens: a scalar, or (B,) for sequences of unequal length

    def reserve(self, tokens: int) -> None:
        """Allocate slots for this many further tokens in every layer."""
        for layer in self.layers:
            layer.reserve(tokens)

    def compact(self, tokens: int) -> None:
        """Free the slots that no sequence uses; tokens is the length of the longest one."""
        for layer in self.layers:
            layer.compact(tokens)

    @property
    def free_slots(self) -> list[int]:
        """Free slots of each layer; a compiled step bypasses the layers, so its caller sets them."""
        return [layer.free_slots for layer in self.layers]

    @free_slots.setter
    def free_slots(self, counts: list[int]) -> None:
        for layer, count in zip(self.layers, counts, strict=True):
            layer.free_slots = count

    def select(self, sequences: mx.array) -> None:
        """Keep the sequences of these batch indices (R,) int, in this order."""
        for layer in self.layers:
            layer.select(sequences)
        if self.offset.ndim:
            self.offset = self.offset[sequences]

    @staticmethod
    def merge(caches: Sequence[Cache]) -> Cache:
        """Return one cache for sequences that were prefilled separately, of any lengths.

        A cache of more than one sequence needs an offset (B,).
        """
        first, *others = caches
        whole = Cache([layer.merged([cache.layers[i] for cache in others]) for i, layer in enumerate(first.layers)])
        whole.offset = mx.concatenate([cache.offset.reshape(-1) for cache in caches])
        return whole

    @property
    def state(self) -> list:
        """Every array that decoding changes: an argument and a result of a compiled step."""
        return [self.offset, *(layer.arrays for layer in self.layers)]

    @state.setter
    def state(self, state: list) -> None:
        self.offset = state[0]
        for layer, arrays in zip(self.layers, state[1:], strict=True):
            layer.arrays = dict(arrays)


def _pairs(k: mx.array, v: mx.array) -> tuple[tuple[str, mx.array], tuple[str, mx.array]]:
    return ("k", k), ("v", v)


def _pad_slots(held: mx.array, axis: int, slots: int, filler: int) -> mx.array:
    widths = [(0, 0)] * held.ndim
    widths[axis] = (0, slots - held.shape[axis])
    return mx.pad(held, widths, constant_values=mx.array(filler, held.dtype))


def _positions(part: dict[str, mx.array]) -> mx.array:
    """Return the positions as (B, C), also where all sequences share them."""
    positions = part["positions"]
    return mx.broadcast_to(positions, (part["k"].shape[0], positions.shape[-1]))
