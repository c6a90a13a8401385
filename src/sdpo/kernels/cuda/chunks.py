"""Chunks of tokens: their size, and buffers for the head's output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from sdpo.kernels.chunked_log_probs import LinearHead
from sdpo.kernels.cuda.logits import Logits, mix_logits

Rows: TypeAlias = "slice | Tensor"

# Limit of all logits buffers, unless half of the free memory is less. With a vocabulary of 152,000 in bfloat16 they
# hold 2,048 rows of the student's logits and 1,024 of the teacher's.
BUFFER_BYTES = 940_000_000
MAX_CHUNK = 4096
# Rows of a cuBLAS tile (128 x 256). With 2,048 columns, a product of 1,024 rows has 64 tiles and one of 2,048 rows has
# 128, which fill most of a Hopper GPU's 132 multiprocessors; 1,408 rows would have 88 tiles.
TILE_ROWS = 128
ROUND_ROWS = 1024
# Row stride of the buffers is a multiple of this many values, for aligned loads of 16 bytes.
ALIGNMENT = 16


def choose_chunk_size(head: LinearHead, buffers: float) -> int:
    """Tokens per chunk, at least ``TILE_ROWS``, from the free memory of the head's device.

    Args:
        buffers: rows of logits in memory per token of the chunk.
    """
    hidden, num_bytes = head.hidden, BUFFER_BYTES
    if hidden.is_cuda:
        cached = torch.cuda.memory_reserved(hidden.device) - torch.cuda.memory_allocated(hidden.device)
        num_bytes = min(num_bytes, (torch.cuda.mem_get_info(hidden.device)[0] + cached) // 2)
    size = min(MAX_CHUNK, int(num_bytes / (buffers * len(head.weight) * hidden.element_size())))
    return max(TILE_ROWS, size - size % (ROUND_ROWS if size >= ROUND_ROWS else TILE_ROWS))


def cut_evenly(start: int, stop: int, size: int) -> Iterator[slice]:
    """Cut into the fewest slices of at most ``size``, equal up to a multiple of ``TILE_ROWS``."""
    number = -(-(stop - start) // size)
    if number == 0:
        return
    length = min(size, -(-(stop - start) // (number * TILE_ROWS)) * TILE_ROWS)
    for first in range(start, stop, length):
        yield slice(first, min(first + length, stop))


def select_rows(rows: Rows, part: slice) -> Rows:
    """The rows at the positions of a slice."""
    return slice(rows.start + part.start, rows.start + part.stop) if isinstance(rows, slice) else rows[part]


def detach_all(parts: Sequence[LinearHead]) -> list[LinearHead]:
    """Detach and cast heads to the hidden states' type; a shared head is cast once."""
    converted: dict[tuple[int, torch.dtype], Tensor] = {}
    detached = []
    for part in parts:
        key = (id(part.weight), part.hidden.dtype)
        plain = replace(part, weight=converted.get(key, part.weight)).detach()
        converted[key] = plain.weight
        detached.append(plain)
    return detached


class Buffer:
    """Reusable memory for the head's output of a chunk."""

    def __init__(self, head: LinearHead, rows: int, temperature: float) -> None:
        self.vocab_size = len(head.weight)
        self.temperature = temperature
        self.memory = head.hidden.new_empty(rows, -(-self.vocab_size // ALIGNMENT) * ALIGNMENT)

    def multiply(self, head: LinearHead, rows: Rows) -> Logits:
        """Logits of these rows; valid until the next call."""
        hidden = head.hidden[rows]
        products = self.memory[: len(hidden), : self.vocab_size]
        torch.mm(hidden, head.weight.T, out=products)
        return Logits(products, head.bias, head.softcap, head.coefficient / self.temperature)


class MixedBuffer:
    """Buffer for the sum of several models' logits; with more than one model, half of it holds the current term."""

    def __init__(self, heads: Sequence[LinearHead], rows: int, temperature: float) -> None:
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
