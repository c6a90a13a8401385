"""The head's output of a chunk, and device functions that read logits from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Logits:
    """Logits of n rows: scale * softcap * tanh((products + bias) / softcap), or scale * (products + bias)."""

    products: Tensor  # [n, V] hidden states times head; the row stride may exceed V
    bias: Tensor | None
    softcap: float | None
    scale: float

    def kernel_arguments(self) -> tuple[Tensor, int, Tensor, float, float]:
        """Pointer, row stride, bias, scale to base 2, soft-cap; placeholders for an absent bias or soft-cap."""
        bias = self.products if self.bias is None else self.bias
        return self.products, self.products.stride(0), bias, self.scale * LOG2_E, self.softcap or 1.0

    def select(self, rows: slice) -> Logits:
        """Logits of these rows."""
        return replace(self, products=self.products[rows])

    def gather(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [n, K] of the entries ``ids`` [n, K], and the soft-cap's derivative there, if any."""
        values = self.products.gather(-1, ids).float()
        if self.bias is not None:
            values = values + self.bias.float()[ids]
        if self.softcap is None:
            return values * self.scale, None
        bent = torch.tanh(values / self.softcap)
        return bent * (self.softcap * self.scale), 1.0 - bent.square()


@triton.jit
def load_transformed_logits(
    row,
    columns,
    vocab_size,
    bias,
    scale_2,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Logits to base 2, -inf beyond the vocabulary; and tanh(u / softcap), from which slope = 1 - tanh^2."""
    inside = columns < vocab_size
    values = tl.load(row + columns, mask=inside, other=float("-inf")).to(tl.float32)
    if HAS_BIAS:
        values += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    bent = values
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)); log2(e) * 2 = 2.885...
        bent = 1.0 - 2.0 / (1.0 + tl.exp2(values * (2.8853900817779268 / softcap)))
        values = tl.where(inside, bent * softcap, float("-inf"))
    return values * scale_2, bent


@triton.jit
def read_logits(
    row,
    columns,
    vocab_size,
    bias,
    scale_2,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Logits to base 2, -inf beyond the vocabulary."""
    values, _bent = load_transformed_logits(row, columns, vocab_size, bias, scale_2, softcap, HAS_BIAS, HAS_SOFTCAP)
    return values


@triton.jit
def _mix_kernel(
    target,
    target_stride,
    target_bias,
    target_scale_2,
    target_softcap,
    other,
    other_stride,
    other_bias,
    other_scale_2,
    other_softcap,
    vocab_size,
    TARGET_HAS_BIAS: tl.constexpr,
    TARGET_HAS_SOFTCAP: tl.constexpr,
    OTHER_HAS_BIAS: tl.constexpr,
    OTHER_HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    target_row = target + row * target_stride
    first = read_logits(
        target_row,
        columns,
        vocab_size,
        target_bias,
        target_scale_2,
        target_softcap,
        TARGET_HAS_BIAS,
        TARGET_HAS_SOFTCAP,
    )
    second = read_logits(
        other + row * other_stride,
        columns,
        vocab_size,
        other_bias,
        other_scale_2,
        other_softcap,
        OTHER_HAS_BIAS,
        OTHER_HAS_SOFTCAP,
    )
    total = (first + second) * 0.6931471805599453
    tl.store(target_row + columns, total.to(target.dtype.element_ty), mask=columns < vocab_size)


def mix_logits(target: Logits, other: Logits, block: int = 4096) -> Logits:
    """Add the logits of two models, overwriting ``target``."""
    rows, vocab_size = target.products.shape
    _mix_kernel[(triton.cdiv(vocab_size, block), rows)](
        *target.kernel_arguments(),
        *other.kernel_arguments(),
        vocab_size,
        TARGET_HAS_BIAS=target.bias is not None,
        TARGET_HAS_SOFTCAP=target.softcap is not None,
        OTHER_HAS_BIAS=other.bias is not None,
        OTHER_HAS_SOFTCAP=other.softcap is not None,
        BLOCK=block,
        num_warps=8,
    )
    return Logits(target.products, None, None, 1.0)
