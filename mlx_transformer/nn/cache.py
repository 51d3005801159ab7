"""What decoding remembers: made by mixers, indexed by depth, moved on by the model alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

EMPTY_POSITION = 2**30  # the position of an empty slot: later than any query, so that the causal rule hides it
_STEP = 16  # slots a full buffer grows by at least: attention takes as long over empty ones as over full ones
_SHARE = 8  # and by an eighth of those it has: a step is compiled anew for each shape


class LayerCache(Protocol):
    """What one mixer remembers. Its arrays can be taken out and put back, so that a compiled step can carry them."""

    arrays: dict[str, mx.array]
    free_slots: int  # tokens that fit at least before any shape changes, known on the host

    def select(self, rows: mx.array) -> None:
        """Keep these rows of the batch, in this order (beam search)."""

    def reserve(self, tokens: int) -> None:
        """Make room for this many further tokens, so that no shape changes while they come."""

    def compact(self, tokens: int) -> None:
        """Free the slots that no sequence uses; tokens is the length of the longest one."""

    def merged(self, others: Sequence[LayerCache]) -> LayerCache:
        """One cache whose batch is this one's rows followed by the others'."""


class KVCache:
    """Keys and values (B, H, C, d) of the tokens so far in a buffer of C slots, with the position of each slot.

    An empty slot has EMPTY_POSITION. Slot and position differ: merged sequences of unequal length share slots.
    """

    def __init__(self) -> None:
        self.arrays: dict[str, mx.array] = {}
        self.free_slots = 0  # free slots at least

    def update(self, k: mx.array, v: mx.array, positions: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Append k and v (B, H, L, d) at positions (L,) or (B, L); return all keys, all values, their positions."""
        length = k.shape[2]
        if not self.arrays:
            self._start(k, v, positions)
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
        """Grow the buffer, by whole steps, until this many tokens fit; a cache that is still empty stays so."""
        if self.free_slots >= tokens or not self.arrays:
            return
        more = -(-max(tokens - self.free_slots, self.arrays["k"].shape[2] // _SHARE) // _STEP) * _STEP
        for name, axis, filler in (("k", 2, 0), ("v", 2, 0), ("positions", -1, EMPTY_POSITION)):
            held = self.arrays[name]
            shape = list(held.shape)
            shape[axis] = more
            self.arrays[name] = mx.concatenate([held, mx.full(shape, filler, held.dtype)], axis=axis)
        self.free_slots += more

    def select(self, rows: mx.array) -> None:
        """Keep these rows (R,) int of the batch, in this order."""
        for name, held in self.arrays.items():
            if name != "used" and held.ndim > 1:
                self.arrays[name] = held[rows]

    def compact(self, tokens: int) -> None:
        """Move the tokens of every sequence, each with positions (B, C) of its own, to the first slots, in order."""
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
        """The rows of all, in buffers as long as the longest; each row keeps its own positions."""
        parts = [cache.arrays for cache in (self, *others)]
        slots = max(part["k"].shape[2] for part in parts)
        whole = KVCache()
        whole.arrays = {
            "k": mx.concatenate([_longer(part["k"], 2, slots, 0) for part in parts]),
            "v": mx.concatenate([_longer(part["v"], 2, slots, 0) for part in parts]),
            "positions": mx.concatenate([_longer(_rows(part), 1, slots, EMPTY_POSITION) for part in parts]),
            "used": mx.array([slots]),  # the next token of every row goes behind the longest row's last slot
        }
        return whole


class State:
    """A recurrent state: named arrays whose first axis is the batch."""

    def __init__(self, **arrays: mx.array) -> None:
        self.arrays = arrays
        self.free_slots = EMPTY_POSITION  # no end of it

    def select(self, rows: mx.array) -> None:
        """Keep these rows (R,) int of the batch, in this order."""
        self.arrays = {name: held[rows] for name, held in self.arrays.items()}

    def reserve(self, tokens: int) -> None:
        """Nothing to do: a state does not grow."""

    def compact(self, tokens: int) -> None:
        """Do nothing: every slot is in use."""

    def merged(self, others: Sequence[LayerCache]) -> State:
        """The rows of all."""
        return State(
            **{name: mx.concatenate([held, *(o.arrays[name] for o in others)]) for name, held in self.arrays.items()}
        )


class WindowCache(State):
    """Keys and values of the last `window` tokens, in their order, and of the first `n_global` positions of a row.

    It never grows. Empty slots stand at position EMPTY_POSITION; every row has positions of its own.
    """

    def __init__(self, window: int, n_global: int) -> None:
        super().__init__()
        self.window, self.n_global = window, n_global

    def update(self, k: mx.array, v: mx.array, positions: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Append k and v (B, H, L, d) at positions (L,) or (B, L); return keys, values and positions (B, C).

        C = n_global + window + L: the global tokens, the window as it was before, the new tokens. Among the latter two
        a global token stands at EMPTY_POSITION, so that nothing is seen twice.
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
        """The global tokens: those that are new, in place of what is held."""
        is_global = new["positions"] == mx.arange(self.n_global)  # (B, 1, L, n_global)
        came, at = is_global.any(axis=2)[..., None], mx.argmax(is_global, axis=2)[..., None]
        first = {}
        for name, x in new.items():
            before = held[f"first_{name}"]
            first[name] = mx.where(came, mx.take_along_axis(x, mx.broadcast_to(at, before.shape), axis=2), before)
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
        """The rows of all, which have equally many slots whatever their length."""
        whole = WindowCache(self.window, self.n_global)
        whole.arrays = super().merged(others).arrays
        return whole


class Cache:
    """A model's memory while it decodes: one LayerCache a depth, the tokens seen, and an encoder's output."""

    def __init__(self, layers: Sequence[LayerCache]) -> None:
        self.layers = list(layers)
        self.offset = mx.array(0)  # tokens seen: a scalar, or (B,) for rows of unequal length
        self.memory: mx.array | None = None

    def reserve(self, tokens: int) -> None:
        """Make room for this many further tokens in every layer."""
        for layer in self.layers:
            layer.reserve(tokens)

    def compact(self, tokens: int) -> None:
        """Free the slots that no sequence uses; tokens is the length of the longest one."""
        for layer in self.layers:
            layer.compact(tokens)

    @property
    def free_slots(self) -> list[int]:
        """Tokens that still fit each layer before its shapes change."""
        return [layer.free_slots for layer in self.layers]

    @free_slots.setter
    def free_slots(self, free_slots: list[int]) -> None:
        for layer, free in zip(self.layers, free_slots, strict=True):
            layer.free_slots = free

    def select(self, rows: mx.array) -> None:
        """Keep these rows (R,) int of the batch, in this order."""
        for layer in self.layers:
            layer.select(rows)
        if self.offset.ndim:
            self.offset = self.offset[rows]
        if self.memory is not None:
            self.memory = self.memory[rows]

    @staticmethod
    def merge(caches: Sequence[Cache]) -> Cache:
        """One cache for rows that were read apart, of equal length or not.

        A cache of more than one row needs an offset (B,).
        """
        first, *others = caches
        whole = Cache([layer.merged([cache.layers[i] for cache in others]) for i, layer in enumerate(first.layers)])
        whole.offset = mx.concatenate([cache.offset.reshape(-1) for cache in caches])
        if first.memory is not None:
            whole.memory = mx.concatenate([cache.memory for cache in caches if cache.memory is not None])
        return whole

    @property
    def state(self) -> list:
        """Every array that decoding changes; a compiled step takes it as an argument and returns it."""
        return [self.offset, *(layer.arrays for layer in self.layers)]

    @state.setter
    def state(self, state: list) -> None:
        self.offset = state[0]
        for layer, arrays in zip(self.layers, state[1:], strict=True):
            layer.arrays = dict(arrays)


def _longer(held: mx.array, axis: int, slots: int, filler: int) -> mx.array:
    widths = [(0, 0)] * held.ndim
    widths[axis] = (0, slots - held.shape[axis])
    return mx.pad(held, widths, constant_values=mx.array(filler, held.dtype))


def _rows(part: dict[str, mx.array]) -> mx.array:
    """Positions as (B, C), whether the rows shared them or not."""
    positions = part["positions"]
    return mx.broadcast_to(positions, (part["k"].shape[0], positions.shape[-1]))
