"""Chunks of tokens: how many at a time, and the products with the head that are held of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from sdpo.algorithm.logits import LazyLogits
from sdpo.kernels.cuda.logits import Logits, mix_logits

Rows: TypeAlias = "slice | Tensor"

# Logits that are held at a time, or half of the free memory if that is less: 2,048 rows of the student's and 1,024 of
# the teacher's with a vocabulary of 152,000 in bfloat16.
BUFFER_BYTES = 940_000_000
LARGEST_CHUNK = 4096
# Rows of the products' tiles. A product of 1,024 rows, or 2,048, by a head of 2,048 columns has 64 tiles, or 128, of
# 128 x 256: nearly all of a Hopper's 132 multiprocessors work. With 1,408 rows it would have 88.
TILE_ROWS = 128
ROUND_ROWS = 1024
# Rows of the buffers begin at multiples of so many values, for loads of 16 bytes.
ALIGNMENT = 16


def choose_chunk_size(head: LazyLogits, buffers: float) -> int:
    """Tokens a chunk, at least ``TILE_ROWS``, from the memory that is free on the head's device.

    Args:
        buffers: rows of logits that are held for a token of the chunk.
    """
    hidden, num_bytes = head.hidden, BUFFER_BYTES
    if hidden.is_cuda:
        cached = torch.cuda.memory_reserved(hidden.device) - torch.cuda.memory_allocated(hidden.device)
        num_bytes = min(num_bytes, (torch.cuda.mem_get_info(hidden.device)[0] + cached) // 2)
    size = min(LARGEST_CHUNK, int(num_bytes / (buffers * len(head.weight) * hidden.element_size())))
    return max(TILE_ROWS, size - size % (ROUND_ROWS if size >= ROUND_ROWS else TILE_ROWS))


def cut_evenly(start: int, stop: int, size: int) -> Iterator[slice]:
    """Slices of at most that size, as few as can be and equal, but for the rows of a tile."""
    number = -(-(stop - start) // size)
    if number == 0:
        return
    length = min(size, -(-(stop - start) // (number * TILE_ROWS)) * TILE_ROWS)
    for first in range(start, stop, length):
        yield slice(first, min(first + length, stop))


def select_rows(rows: Rows, part: slice) -> Rows:
    """Those of some rows that stand at the places of a slice."""
    return slice(rows.start + part.start, rows.start + part.stop) if isinstance(rows, slice) else rows[part]


def detach_all(parts: Sequence[LazyLogits]) -> list[LazyLogits]:
    """Without a graph, heads in the type of the hidden states; a head that is shared is converted once."""
    converted: dict[tuple[int, torch.dtype], Tensor] = {}
    detached = []
    for part in parts:
        key = (id(part.weight), part.hidden.dtype)
        plain = replace(part, weight=converted.get(key, part.weight)).detach()
        converted[key] = plain.weight
        detached.append(plain)
    return detached


class Buffer:
    """Memory for the products of hidden states and head of some rows, used again and again."""

    def __init__(self, head: LazyLogits, rows: int, temperature: float) -> None:
        self.vocab_size = len(head.weight)
        self.temperature = temperature
        self.memory = head.hidden.new_empty(rows, -(-self.vocab_size // ALIGNMENT) * ALIGNMENT)

    def multiply(self, head: LazyLogits, rows: Rows) -> Logits:
        """Logits of some rows; valid until the next call."""
        hidden = head.hidden[rows]
        products = self.memory[: len(hidden), : self.vocab_size]
        torch.mm(hidden, head.weight.T, out=products)
        return Logits(products, head.bias, head.softcap, head.coefficient / self.temperature)


class MixedBuffer:
    """The same for a policy of one model or several, whose logits are added up; of several, half is for the terms."""

    def __init__(self, heads: Sequence[LazyLogits], rows: int, temperature: float) -> None:
        self.heads = heads
        self.rows = rows if len(heads) == 1 else -(-rows // 2)
        self.total = Buffer(heads[0], self.rows, temperature)
        self.term = Buffer(heads[0], self.rows, temperature) if len(heads) > 1 else None

    def multiply(self, rows: Rows) -> Logits:
        """Logits of at most ``self.rows`` rows; valid until the next call."""
        total = self.total.multiply(self.heads[0], rows)
        for head in self.heads[1:]:
            assert self.term is not None
            total = mix_logits(total, self.term.multiply(head, rows))
        return total
