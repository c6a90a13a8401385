"""The student's k largest logits of each row, without a search of the whole vocabulary.

They are in the k groups of neighbouring entries with the largest maxima, and ``row_statistics`` has computed these
maxima. So two smaller searches suffice: V / GROUP maxima, then k * GROUP candidates.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdpo.kernels.cuda.logits import Logits, read_logits
from sdpo.kernels.cuda.row_statistics import GROUP


def select_top_ids(student: Logits, group_maxima: Tensor, k: int, block: int = 1024) -> Tensor:
    """Ids of the k largest entries, [n, k], unsorted.

    Args:
        student: [n, V].
        group_maxima: [n, ceil(V / GROUP)].
        k: 1 <= k <= V.
    """
    num_groups = group_maxima.shape[1]
    groups = group_maxima.topk(min(k, num_groups), dim=-1, sorted=False).indices
    candidates = _gather_candidates(student, groups, block)
    chosen = candidates.topk(k, dim=-1, sorted=False).indices
    group = groups.gather(-1, torch.div(chosen, GROUP, rounding_mode="floor"))
    return group * GROUP + chosen % GROUP


def _gather_candidates(student: Logits, groups: Tensor, block: int) -> Tensor:
    """Logits to base 2 of the entries of groups [n, g], as [n, g * GROUP]; -inf beyond the vocabulary."""
    rows = len(groups)
    candidates = torch.empty(rows, groups.shape[1] * GROUP, device=groups.device)
    products, stride, bias, scale_2, softcap = student.kernel_arguments()
    _candidates_kernel[(triton.cdiv(candidates.shape[1], block), rows)](
        products,
        stride,
        bias,
        scale_2,
        softcap,
        groups,
        candidates,
        student.products.shape[1],
        groups.shape[1],
        HAS_BIAS=student.bias is not None,
        HAS_SOFTCAP=student.softcap is not None,
        GROUP_SIZE=GROUP,
        BLOCK=block,
        num_warps=4,
    )
    return candidates


@triton.jit
def _candidates_kernel(
    student,
    student_stride,
    bias,
    scale_2,
    softcap,
    groups,
    candidates,
    vocab_size,
    num_groups,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside = places < num_groups * GROUP_SIZE
    group = tl.load(groups + row * num_groups + places // GROUP_SIZE, mask=inside, other=0)
    columns = group * GROUP_SIZE + places % GROUP_SIZE
    logits = read_logits(
        student + row * student_stride, columns, vocab_size, bias, scale_2, softcap, HAS_BIAS, HAS_SOFTCAP
    )
    # Clamp -inf, so that entries of probability 0 rank above positions beyond the vocabulary.
    logits = tl.where(columns < vocab_size, tl.maximum(logits, -3.0e38), float("-inf"))
    tl.store(candidates + row * num_groups * GROUP_SIZE + places, logits, mask=inside)
