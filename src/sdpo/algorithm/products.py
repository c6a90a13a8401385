"""Matrix products in float32 on a CPU, by the library that is fastest there.

torch multiplies float32 matrices with MKL, which on AMD's processors leaves half of their vectors' width unused.
oneDNN, which torch has beside it for other types, does not: with AVX-512 it is 2 to 2.4 times as fast, and as precise.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# Multiplications in a product from which on oneDNN's longer start pays.
MIN_SIZE = 2**20
# Rows of a large matrix that are multiplied at once where the result is copied: it is in the cache then.
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
    """The largest number up to ``length`` of which there are eight an octave.

    oneDNN keeps what it makes for a shape, a thousand of them: rows packed to another number each time took 0.7 GB.
    """
    return length - length % _find_step(length)


def round_up_rows(tensor: Tensor) -> Tensor:
    """[..., K] as rows [M, K], with rows of zeros behind them until M is round (``find_round_length``)."""
    rows = tensor.flatten(0, -2)
    missing = -len(rows) % _find_step(len(rows))
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def _find_step(length: int) -> int:
    return max(1, 2 ** (length - 1).bit_length() // 16)


def goes_to_onednn(tensor: Tensor) -> bool:
    """Whether large products with this tensor do, if the other one has its type."""
    return tensor.is_cpu and tensor.dtype == torch.float32 and prefers_onednn()


@cache
def prefers_onednn() -> bool:
    """Whether float32 products go to oneDNN: on AMD's processors with AVX-512.

    A rule and no measurement, so that a run is the same number for number whenever it is repeated on a machine.
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
