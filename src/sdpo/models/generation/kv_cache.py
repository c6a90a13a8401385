"""A key-value cache that is extended in place: a new token copies only its own keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# A new buffer has room for 16 more tokens or 1 / 8 of the tokens it holds, whichever is more. A small room keeps the
# memory that attention reads compact and wastes little; this room is large enough that the copies cost little.
MIN_GROWTH, ROOM_DIVISOR = 16, 8


def build_cache(config: Any, capacity: int) -> DynamicCache:
    """The cache of a transformers model, for at most ``capacity`` tokens per row.

    Only full-attention layers use ``PreallocatedCacheLayer``. Other layers (sliding window, linear attention) keep the
    classes of transformers.
    """
    cache = DynamicCache(config=config)
    cache.layers = [
        PreallocatedCacheLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


class PreallocatedCacheLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer of full attention.

    ``keys`` and ``values`` of all tokens so far are [rows, heads, tokens, head size]. After the prompt they are the
    prompt's tensors; later they are views of larger buffers, which are replaced when full.
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
        """Repeat each row ``repeats`` times; copies of a row are adjacent."""
        self._make_room(1, repeats)

    def _make_room(self, needed: int, repeats: int = 1) -> None:
        length = self.get_seq_length()
        room = min(max(needed, MIN_GROWTH, length // ROOM_DIVISOR), self._capacity - length)
        if room < needed:
            raise ValueError(f"cache capacity is {self._capacity} tokens, got {length + needed}")
        self.keys = _copy(self.keys, repeats, room)
        self.values = _copy(self.values, repeats, room)
        self._room = room

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in place; only rows with a new index are copied."""
        places = torch.arange(len(indices), device=indices.device)
        moved = (indices != places).nonzero()[:, 0]
        for held in (self.keys, self.values):
            held[moved] = held[indices[moved]]
        self.keys, self.values = self.keys[: len(indices)], self.values[: len(indices)]


def _copy(held: Tensor, repeats: int, room: int) -> Tensor:
    """Copy into a new buffer, each row ``repeats`` times, with room for more tokens; returns the filled view."""
    rows, heads, length, size = held.shape
    return fill_buffer(held.new_empty(rows * repeats, heads, length + room, size), held, repeats)


def fill_buffer(buffer: Tensor, held: Tensor, repeats: int) -> Tensor:
    """Copy [rows, heads, tokens, size] to the beginning of a buffer, each row ``repeats`` times; returns that view."""
    filled = buffer[:, :, : held.shape[2]]
    filled.unflatten(0, (len(held), repeats)).copy_(held[:, None])
    return filled


def _extend(held: Tensor, new: Tensor) -> Tensor:
    """Append tokens to ``held``, in the buffer that it is a view of."""
    rows, heads, length, size = held.shape
    longer = held.as_strided((rows, heads, length + new.shape[-2], size), held.stride())
    longer[:, :, length:].copy_(new)
    return longer
