"""A key-value cache that is written in place: reading a token copies that token's keys and values and no others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# A new buffer has room for this many more tokens, or for this share of those that it holds: few, so that what attention
# reads lies close together and nothing is kept for tokens that never come; enough that copying does not count.
ROOM, ROOM_SHARE = 16, 8


def build_cache(config: Any, capacity: int) -> DynamicCache:
    """The cache of a model of transformers, for at most ``capacity`` tokens a row.

    Layers that keep something else than the keys and values of all tokens (a sliding window, the state of linear
    attention) stay transformers' own.
    """
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer of full attention.

    ``keys`` and ``values`` are those of all tokens read, [rows, heads, tokens, head size]: first the tensors that the
    prompts left, then views of buffers with room for some more, which are replaced when they are full.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._room = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        added = key_states.shape[-2]
        if added > self._room:
            self._make_room(added)
        self._room -= added
        self.keys, self.values = _extend(self.keys, key_states), _extend(self.values, value_states)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times; those of a row lie side by side."""
        self._make_room(1, repeats)

    def _make_room(self, needed: int, repeats: int = 1) -> None:
        length = self.get_seq_length()
        room = min(max(needed, ROOM, length // ROOM_SHARE), self._capacity - length)
        if room < needed:
            raise ValueError(f"a cache of {self._capacity} tokens was given {length + needed}")
        self.keys = _copy(self.keys, repeats, room)
        self.values = _copy(self.values, repeats, room)
        self._room = room

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in place: only rows that change their place are copied."""
        places = torch.arange(len(indices), device=indices.device)
        moved = (indices != places).nonzero()[:, 0]
        for held in (self.keys, self.values):
            held[moved] = held[indices[moved]]
        self.keys, self.values = self.keys[: len(indices)], self.values[: len(indices)]


def _copy(held: Tensor, repeats: int, room: int) -> Tensor:
    """A view of a new buffer that begins with each row ``repeats`` times and has room for more tokens."""
    rows, heads, length, size = held.shape
    buffer = held.new_empty(rows * repeats, heads, length + room, size)[:, :, :length]
    buffer.unflatten(0, (rows, repeats)).copy_(held[:, None])
    return buffer


def _extend(held: Tensor, new: Tensor) -> Tensor:
    """``held`` with further tokens, written into the buffer that it is a view of."""
    rows, heads, length, size = held.shape
    longer = held.as_strided((rows, heads, length + new.shape[-2], size), held.stride())
    longer[:, :, length:].copy_(new)
    return longer
