"""Decoding steps that a GPU replays as CUDA graphs.

A decoding step of a model with 30 layers launches a thousand kernels of a few microseconds each, and the launches take
longer than the kernels. A CUDA graph launches all of them at once. It needs fixed shapes and fixed memory: the cache
has its final size from the beginning, a step writes its keys and values at a place that a tensor holds, and attention
reads a multiple of ``PLACES_PER_GRAPH`` places under a mask. Rows beyond the batch and places beyond the sequence are
computed and ignored.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from sdpo.algorithm.teacher import LogitMixture
from sdpo.models.generation.decoding_state import DecodingState
from sdpo.models.generation.kv_cache import PreallocatedCacheLayer, build_cache, fill_buffer
from sdpo.models.packing.attention import NAME

logger = logging.getLogger(__name__)

PLACES_PER_GRAPH = 1024
# Capturing a graph takes about as long as three steps without it; below this many steps it does not pay.
MIN_STEPS = 32


def build_decoding_state(policy: LogitMixture, capacity: int, num_steps: int) -> DecodingState:
    """State of a batch of at most ``capacity`` tokens per row and ``num_steps`` decoding steps."""
    if num_steps >= MIN_STEPS and all(can_be_captured(module) for module, _ in policy):
        return GraphedDecodingState(policy, capacity)
    return DecodingState(policy, capacity)


def can_be_captured(module: Any) -> bool:
    """Whether this model's decoding steps can have fixed shapes: on CUDA, full attention by SDPA in every layer."""
    if next(module.parameters()).device.type != "cuda":
        return False
    attends_by_sdpa = module.config.get_text_config()._attn_implementation in ("sdpa", NAME)
    return attends_by_sdpa and all(isinstance(x, PreallocatedCacheLayer) for x in build_cache(module.config, 1).layers)


class FixedCacheLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer in buffers [rows, heads, capacity, head size].

    Args:
        keys, values: of the prompts, [rows, heads, tokens, head size].
        repeats: adjacent copies of each row.
        capacity: tokens per row.
        place: [1], index in the buffers at which a step writes.
    """

    def __init__(self, keys: Tensor, values: Tensor, repeats: int, capacity: int, place: Tensor) -> None:
        super().__init__()
        self._place = place
        # Zeros, because the mask does not stop NaN in values.
        self._buffers = [_allocate(states, repeats, capacity) for states in (keys, values)]
        self.lazy_initialization(keys, values)
        self.limit(len(keys) * repeats, capacity)

    def limit(self, num_rows: int, num_places: int) -> None:
        """Set the part of the buffers that the next steps read."""
        self.keys, self.values = (buffer[:num_rows, :, :num_places] for buffer in self._buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self._place, key_states)
        self.values.index_copy_(2, self._place, value_states)
        return self.keys, self.values

    def move_rows(self, places: Tensor, indices: Tensor) -> None:
        """Copy rows ``indices`` to ``places``."""
        for buffer in self._buffers:
            buffer[places] = buffer[indices]


def _allocate(states: Tensor, repeats: int, capacity: int) -> Tensor:
    rows, heads, _, size = states.shape
    buffer = states.new_zeros(rows * repeats, heads, capacity, size)
    fill_buffer(buffer, states, repeats)
    return buffer


class GraphedDecodingState(DecodingState):
    """As ``DecodingState``, with a graph for each number of rows (powers of two) and of places."""

    def repeat(self, n: int) -> None:
        self._position = self.last_position.repeat_interleave(n, dim=0)
        self._token = torch.zeros_like(self._position)
        self.num_rows = len(self._token)
        self._place = torch.full((1,), self.length - 1, device=self._token.device)
        self._visible = torch.zeros(self.num_rows, 1, 1, self.capacity, dtype=torch.bool, device=self._token.device)
        read = True if self.mask is None else self.mask[:, : self.length].bool().repeat_interleave(n, dim=0)
        self._visible[:, 0, 0, : self.length] = read
        for cache in self.caches:
            cache.layers = [
                FixedCacheLayer(layer.keys, layer.values, n, self.capacity, self._place) for layer in cache.layers
            ]
        self._steps: dict[tuple[int, int], Callable[[], Tensor]] = {}
        self._pool: Any = None

    def decode(self, token: Tensor) -> Tensor:
        self._token[: self.num_rows] = token
        self._position += 1
        self._place += 1
        self._visible[..., self.length] = True
        self.length += 1
        num_rows = min(1 << (self.num_rows - 1).bit_length(), len(self._token))
        num_places = min(-(-self.length // PLACES_PER_GRAPH) * PLACES_PER_GRAPH, self.capacity)
        if (num_rows, num_places) not in self._steps:
            self._steps[num_rows, num_places] = self._capture(num_rows, num_places)
        return self._steps[num_rows, num_places]()[: self.num_rows]

    def select(self, rows: Tensor) -> None:
        places = torch.arange(len(rows), device=rows.device)
        moved = (rows != places).nonzero()[:, 0]
        sources = rows[moved]
        for held in (self._position, self._visible):
            held[moved] = held[sources]
        for cache in self.caches:
            for layer in cache.layers:
                layer.move_rows(moved, sources)
        self.num_rows = len(rows)

    def _capture(self, num_rows: int, num_places: int) -> Callable[[], Tensor]:
        def compute() -> Tensor:
            for cache in self.caches:
                for layer in cache.layers:
                    layer.limit(num_rows, num_places)
            positions = self._position[:num_rows, None].expand(*self.axes, -1, 1)
            return self._forward(self._token[:num_rows, None], self._visible[:num_rows, :, :, :num_places], positions)

        if self._token.device.type != "cuda":
            return compute
        stream = torch.cuda.Stream(self._token.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate their workspaces in the first call
            compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                logits = compute()
        except RuntimeError as error:
            logger.warning("decoding without CUDA graphs: %s", " ".join(str(error).split())[:300])
            torch.cuda.synchronize()
            return compute
        self._pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay
