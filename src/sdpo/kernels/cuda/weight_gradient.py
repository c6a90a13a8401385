"""The gradient by the head's weight, summed over chunks."""

from __future__ import annotations

import torch
from torch import Tensor


class WeightGradient:
    """Sum of G^T X over chunks, [V, H]; each matrix product accumulates in float32 and adds to the sum.

    The sum has the weight's type, which avoids a second copy. With a weight in half precision the sum is rounded once
    per chunk. Chunks have 1,000 tokens or more, so this error stays below the rounding of G for a few hundred thousand
    tokens.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.total = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        self.is_empty = True

    def add(self, grad_logits: Tensor, hidden: Tensor) -> None:
        """Add the product of G [n, V] and X [n, H], which have the same type."""
        beta = 0 if self.is_empty else 1
        self.is_empty = False
        if self.total.dtype == grad_logits.dtype:
            if beta == 0:
                torch.mm(grad_logits.T, hidden, out=self.total)
            else:
                self.total.addmm_(grad_logits.T, hidden)
        elif grad_logits.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):  # torch 2.8
            if beta == 0:
                torch.ops.aten.mm.dtype_out(grad_logits.T, hidden, self.total.dtype, out=self.total)
            else:
                torch.ops.aten.addmm.dtype_out(self.total, grad_logits.T, hidden, self.total.dtype, out=self.total)
        else:
            for some, columns in zip(self.total.split(PIECE), grad_logits.split(PIECE, dim=-1), strict=True):
                product = columns.T @ hidden
                some.copy_(product) if beta == 0 else some.add_(product)

    def finish(self) -> Tensor:
        """The sum; zeros if nothing was added."""
        return self.total.zero_() if self.is_empty else self.total


PIECE = 16_384  # rows of the head at once, if torch cannot add a product to a sum of another type
