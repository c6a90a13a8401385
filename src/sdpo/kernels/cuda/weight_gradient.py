"""The gradient by the head's weight: a sum of products over the chunks."""

from __future__ import annotations

import torch
from torch import Tensor


class WeightGradient:
    """sum of G^T X over chunks, [V, H], each product summed up in float32 and added by the product itself.

    Its type is the weight's own, so that no second copy is needed. With a weight in half precision the sum is rounded
    once a chunk; chunks have a thousand tokens and more, so this stays below the rounding of G itself for some hundred
    thousand tokens.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.total = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        self.is_empty = True

    def add(self, by_logits: Tensor, hidden: Tensor) -> None:
        """G [n, V] and X [n, H], of one type."""
        beta = 0 if self.is_empty else 1
        self.is_empty = False
        if self.total.dtype == by_logits.dtype:
            if beta == 0:
                torch.mm(by_logits.T, hidden, out=self.total)
            else:
                self.total.addmm_(by_logits.T, hidden)
        elif by_logits.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):  # torch 2.8
            if beta == 0:
                torch.ops.aten.mm.dtype_out(by_logits.T, hidden, self.total.dtype, out=self.total)
            else:
                torch.ops.aten.addmm.dtype_out(self.total, by_logits.T, hidden, self.total.dtype, out=self.total)
        else:
            for some, columns in zip(self.total.split(PIECE), by_logits.split(PIECE, dim=-1), strict=True):
                product = columns.T @ hidden
                some.copy_(product) if beta == 0 else some.add_(product)

    def finish(self) -> Tensor:
        """The sum; zeros if nothing was added."""
        return self.total.zero_() if self.is_empty else self.total


PIECE = 16_384  # rows of the head at a time, where a product cannot be added to a sum of another type
