"""Multiply a gradient by a device scalar with loads of 16 bytes; torch's product loads 2 bytes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192


def scale(values: Tensor, factor: Tensor) -> Tensor:
    """values * factor, in the type of ``values``; ``values`` is contiguous, ``factor`` a scalar []."""
    assert values.is_contiguous()
    scaled = torch.empty_like(values)
    if values.numel():
        grid = (triton.cdiv(values.numel(), BLOCK),)
        _scale_kernel[grid](values, factor, scaled, values.numel(), BLOCK=BLOCK, num_warps=8)
    return scaled


@triton.jit
def _scale_kernel(values, factor, scaled, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    products = tl.load(values + at, inside).to(tl.float32) * tl.load(factor).to(tl.float32)
    tl.store(scaled + at, products.to(scaled.dtype.element_ty), inside)
