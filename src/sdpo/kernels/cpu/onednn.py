"""Matrix products in float32 on a CPU, by MKL or oneDNN, whichever is faster there.

torch multiplies float32 matrices with MKL, which on AMD CPUs uses only half of the vector width. oneDNN, which torch
uses for other types, uses all of it: with AVX-512 it is 2 to 2.4 times as fast and equally precise.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# Smallest product, in multiplications, for which oneDNN's call overhead pays off.
MIN_SIZE = 2**20
# Rows of a large matrix per product if the result is copied; the result then fits in the cache.
PIECE_ROWS = 4096


def multiply(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left @ right.T + bias, of [..., K] and [N, K]; either may be a transposed view. No gradient."""
    size = left.numel() * len(right)
    if size >= MIN_SIZE and left.dtype == right.dtype and goes_to_onednn(right):
        try:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
            return product
        except RuntimeError:
            pass  # after an OOM, oneDNN may reject this shape permanently; torch re-raises other errors
    return torch.nn.functional.linear(left, right, bias)


def multiply_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """left @ right.T of [M, K] and [N, K] into ``out`` [M, N]; no gradient."""
    if not goes_to_onednn(right):
        torch.mm(left, right.T, out=out)
        return
    for columns, rows in zip(out.split(PIECE_ROWS, dim=1), right.split(PIECE_ROWS), strict=True):
        columns.copy_(multiply(left, rows))  # oneDNN allocates its outputs


def find_round_length(length: int) -> int:
    """The largest round number up to ``length``; there are eight round numbers per power of two.

    oneDNN caches primitives for 1,000 shapes: packed rows of a different length each time took 0.7 GB.
    """
    return length - length % _find_step(length)


def round_up_rows(tensor: Tensor) -> Tensor:
    """Flatten [..., K] to rows [M, K], padded with zero rows to a round M (``find_round_length``)."""
    rows = tensor.flatten(0, -2)
    missing = -len(rows) % _find_step(len(rows))
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def _find_step(length: int) -> int:
    return max(1, 2 ** (length - 1).bit_length() // 16)


def goes_to_onednn(tensor: Tensor) -> bool:
    """Whether large products of this tensor with another of its type use oneDNN."""
    return tensor.is_cpu and tensor.dtype == torch.float32 and prefers_onednn()


@cache
def prefers_onednn() -> bool:
    """Whether float32 products use oneDNN: on AMD CPUs with AVX-512.

    A fixed rule instead of a measurement keeps runs on a machine reproducible bit for bit.
    """
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        if "AuthenticAMD" not in Path("/proc/cpuinfo").read_text(encoding="utf-8")[:1000]:
            return False
        torch.ops.mkldnn._linear_pointwise(torch.ones(1, 1), torch.ones(1, 1), None, "none", [], "")
    except (OSError, RuntimeError, AttributeError):
        return False
    return True
