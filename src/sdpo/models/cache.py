"""A key-value cache that is written in place: reading a token copies that token's keys and values and no others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def build_cache(config: Any, capacity: int) -> DynamicCache:
    """The cache of a model of transformers, for at most ``capacity`` tokens a row.

    Layers that keep something else than the keys and values of all tokens (a sliding window, the state of linear
    attention) stay transformers' own.
    """
    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def attends_to_all(cache: DynamicCache) -> bool:
    """Whether each layer attends to every token that was read, so that one mask serves them all."""
    return bool(cache.layers) and all(isinstance(layer, PreallocatedLayer) for layer in cache.layers)


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer of full attention.

    ``keys`` and ``values`` are those of all tokens read, [rows, heads, tokens, head size]: first the tensors that the
    prompts left, then views of buffers that hold ``capacity`` tokens.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        if self._buffers is None:
            self.batch_repeat_interleave(1)
        assert self._buffers is not None
        rows, _, start, _ = self.keys.shape
        end = start + key_states.shape[-2]
        if end > self._capacity:
            raise ValueError(f"a cache of {self._capacity} tokens was given {end}")
        self.keys, self.values = (buffer[:rows, :, :end] for buffer in self._buffers)
        self.keys[:, :, start:].copy_(key_states)
        self.values[:, :, start:].copy_(value_states)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        keys, values = (self._spread(held, repeats) for held in (self.keys, self.values))
        self._buffers = keys, values
        self.keys, self.values = (buffer[:, :, : self.get_seq_length()] for buffer in self._buffers)

    def _spread(self, held: Tensor, repeats: int) -> Tensor:
        rows, heads, length, size = held.shape
        buffer = held.new_empty(rows * repeats, heads, self._capacity, size)
        buffer[:, :, :length].unflatten(0, (rows, repeats)).copy_(held[:, None])
        return buffer

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in place: only rows that change their place are copied."""
        places = torch.arange(len(indices), device=indices.device)
        moved = (indices != places).nonzero()[:, 0]
        for held in (self.keys, self.values):
            held[moved] = held[indices[moved]]
        self.keys, self.values = self.keys[: len(indices)], self.values[: len(indices)]
