"""Backward products of the output head, in pieces sized for the cache.

G is dL / dz, one row per token; X the tokens' hidden states; W the head's weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo.kernels.cpu.onednn import goes_to_onednn, multiply

# Size of the pieces in which oneDNN computes the head's gradient: a piece stays in the cache.
PIECE_BYTES = 4_000_000
# The same on an accelerator, which needs larger pieces for full utilization.
ACCELERATOR_PIECE_BYTES = 64_000_000
# Number of pieces of a gradient that are freed together: with fewer, the OS does not use huge pages.
PART_PIECES = 16


class HeadGradAccumulator:
    """Sum of G^T X over chunks, [V, H], in the softmax's type, because half precision would round away later chunks."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.in_place = weight.dtype == dtype and not goes_to_onednn(weight)
        self.piece_rows = _count_piece_rows(weight)
        self.part_rows = len(weight) if weight.dtype == dtype else PART_PIECES * self.piece_rows
        self.parts = [torch.empty_like(part, dtype=dtype) for part in weight.split(self.part_rows)]
        self.num_chunks = 0

    def add(self, grad_logits: Tensor, hidden: Tensor) -> None:
        """Add the product of G [n, V] and X [n, H]."""
        transposed = hidden.T.contiguous() if goes_to_onednn(hidden) else hidden.T
        for part, columns in zip(self.parts, grad_logits.split(self.part_rows, dim=-1), strict=True):
            if self.in_place:
                part.addmm_(columns.T, hidden, beta=min(self.num_chunks, 1))
                continue
            for piece, some in zip(part.split(self.piece_rows), columns.split(self.piece_rows, dim=-1), strict=True):
                more = multiply(some.T, transposed)
                piece.add_(more) if self.num_chunks else piece.copy_(more)
        self.num_chunks += 1

    def finish(self, dtype: torch.dtype) -> Tensor:
        """Return the sum. Each part is freed once converted, so that the gradient is not in memory twice."""
        if self.num_chunks == 0:
            for part in self.parts:
                part.zero_()
        if len(self.parts) == 1:
            return self.parts.pop().to(dtype)
        total = self.parts[0].new_empty(sum(map(len, self.parts)), self.parts[0].shape[1], dtype=dtype)
        for target in total.split(self.part_rows):
            target.copy_(self.parts.pop(0))
        return total


def blocked_matmul(grad_logits: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """G W, [n, H]."""
    if grad_logits.dtype == dtype and not goes_to_onednn(weight):
        return grad_logits @ weight
    # oneDNN sums over the whole vocabulary more slowly than over pieces of it.
    total = grad_logits.new_zeros(len(grad_logits), weight.shape[1], dtype=dtype)
    rows = 4 * _count_piece_rows(weight)
    for columns, piece in zip(grad_logits.split(rows, dim=-1), weight.split(rows), strict=True):
        total.add_(multiply(columns, piece.T))
    return total.to(weight.dtype)


def _count_piece_rows(weight: Tensor) -> int:
    piece_bytes = PIECE_BYTES if weight.device.type == "cpu" else ACCELERATOR_PIECE_BYTES
    return min(len(weight), max(1, piece_bytes // (weight.shape[1] * torch.float32.itemsize)))
