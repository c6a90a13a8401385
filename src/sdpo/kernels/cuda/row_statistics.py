"""Statistics of each row of logits for the loss, from one read of student and teacher.

Online softmax: maximum, sum of exponentials and the other sums are updated block by block. Each lane of eight
neighbouring entries has its own sums, so threads synchronize only at the end of a row. With y the logits to base 2, m a
lane's maximum so far and e = 2^(y - m):

    total     sum e                          log-sum-exp  m + log2 total
    weighted  sum e (y - m)                  entropy      log2 total - weighted / total
    crossed   sum e (y - y')                 KL           crossed / total - log-sum-exp + log-sum-exp'

When m grows by s, -s total is added to ``weighted``, then all three sums are multiplied by 2^-s. The Jensen-Shannon
divergence needs both log-sum-exps for its mixture, so it reads the row a second time, backwards, because the end of the
row is still in the cache.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdpo.kernels.cuda.logits import LOG2_E, Logits, read_logits

NO_DIVERGENCE, FORWARD_KL, REVERSE_KL, JENSEN_SHANNON = range(4)
GROUP = 32  # entries per stored maximum, for the top-k search
NUM_STATISTICS = 8


@dataclass(frozen=True)
class Launch:
    """Entries per block, warps per program, and stages of load pipelining."""

    block: int
    num_warps: int
    stages: int = 1


# The fastest of eight on an H200 (benchmarks/gpu/loss.py variants).
STATISTICS_LAUNCH = Launch(2048, 4)
JENSEN_SHANNON_LAUNCH = Launch(4096, 16)


@dataclass(frozen=True)
class RowStatistics:
    """Statistics of n rows, in nats unless named ``_2``; the teacher's are undefined without a teacher."""

    packed: Tensor  # [NUM_STATISTICS, n] all statistics, in the kernels' layout
    group_maxima: Tensor | None  # [n, ceil(V / GROUP)] to base 2

    @property
    def student_log_sum_exp_2(self) -> Tensor:
        return self.packed[0]

    @property
    def student_log_probs(self) -> Tensor:
        """[n] of the sampled tokens."""
        return self.packed[1]

    @property
    def student_entropies(self) -> Tensor:
        return self.packed[2]

    @property
    def teacher_log_sum_exp_2(self) -> Tensor:
        return self.packed[3]

    @property
    def teacher_log_probs(self) -> Tensor:
        return self.packed[4]

    @property
    def teacher_entropies(self) -> Tensor:
        return self.packed[5]

    @property
    def divergences(self) -> Tensor:
        return self.packed[6]


def compute_row_statistics(
    student: Logits,
    teacher: Logits | None,
    sampled_ids: Tensor,
    *,
    alpha: float | None = None,
    group_maxima: bool = False,
    launch: Launch | None = None,
) -> RowStatistics:
    """Statistics of n rows.

    Args:
        student, teacher: [n, V].
        sampled_ids: [n].
        alpha: of the divergence of whole distributions; None: no divergence.
        group_maxima: also compute the maximum of each ``GROUP`` entries of the student.
    """
    rows, vocab_size = student.products.shape
    divergence = name_divergence(alpha)
    if launch is None:
        launch = JENSEN_SHANNON_LAUNCH if divergence == JENSEN_SHANNON else STATISTICS_LAUNCH
    packed = torch.empty(NUM_STATISTICS, rows, dtype=torch.float32, device=student.products.device)
    num_groups = -(-vocab_size // GROUP)
    maxima = packed.new_empty(rows, num_groups) if group_maxima else None
    other = student if teacher is None else teacher
    _statistics_kernel[(rows,)](
        *student.kernel_arguments(),
        *other.kernel_arguments(),
        sampled_ids.contiguous(),
        packed,
        packed if maxima is None else maxima,
        rows,
        vocab_size,
        num_groups,
        *mixture_logs(alpha),
        HAS_TEACHER=teacher is not None,
        DIVERGENCE=divergence,
        HAS_GROUPS=group_maxima,
        **name_features(student, other),
        GROUP_SIZE=GROUP,
        BLOCK=launch.block,
        STAGES=launch.stages,
        num_warps=launch.num_warps,
    )
    return RowStatistics(packed, maxima)


def name_divergence(alpha: float | None) -> int:
    """The kernel's constant for a divergence."""
    if alpha is None:
        return NO_DIVERGENCE
    return {0.0: FORWARD_KL, 1.0: REVERSE_KL}.get(alpha, JENSEN_SHANNON)


def mixture_logs(alpha: float | None) -> tuple[float, float]:
    """log2(1 - alpha), log2 alpha; zeros if the divergence has no mixture."""
    if alpha is None or alpha in (0.0, 1.0):
        return 0.0, 0.0
    return math.log1p(-alpha) * LOG2_E, math.log2(alpha)


def name_features(student: Logits, teacher: Logits) -> dict[str, Any]:
    """Compile-time flags of the kernels."""
    return {
        "STUDENT_HAS_BIAS": student.bias is not None,
        "STUDENT_HAS_SOFTCAP": student.softcap is not None,
        "TEACHER_HAS_BIAS": teacher.bias is not None,
        "TEACHER_HAS_SOFTCAP": teacher.softcap is not None,
    }


if os.environ.get("TRITON_INTERPRET") == "1":

    @triton.jit
    def _log2(values):
        return tl.log2(values)
else:

    @triton.jit
    def _log2(values):
        # Hardware log2: its error of 2^-22 is small enough for 1 + ratio; Triton's log2 takes thirty instructions.
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [values], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def compare_with_mixture(student_share, teacher_share):
    """For x = (1 - alpha) s, y = alpha t (given as log2) and m = x + y: log2(x / m), log2(y / m), smaller / larger.

    Both are min(difference, 0) - log2(1 + smaller / larger), a form without cancellation.
    """
    difference = student_share - teacher_share
    ratio = tl.exp2(-tl.abs(difference))
    added = _log2(1.0 + ratio)
    return tl.minimum(difference, 0.0) - added, tl.minimum(-difference, 0.0) - added, ratio


@triton.jit
def _update(logits, peak, total, weighted):
    """Update sums [lanes] with a block [lanes, 8]; also returns its e, the factor of older sums, and maxima."""
    largest = tl.max(logits, axis=1)
    new_peak = tl.maximum(peak, largest)
    shift = peak - new_peak
    decay = tl.exp2(shift)
    distance = logits - new_peak[:, None]
    # 2^-16384 is 0, and 0 times it is 0. NaN stays.
    distance = tl.maximum(distance, -16384.0, propagate_nan=tl.PropagateNan.ALL)
    terms = tl.exp2(distance)
    weighted = (weighted + total * shift) * decay + tl.sum(terms * distance, axis=1)
    total = total * decay + tl.sum(terms, axis=1)
    return new_peak, total, weighted, terms, decay, largest


@triton.jit
def _combine(peak, total, weighted, crossed):
    """Reduce the lanes' sums to log-sum-exp to base 2, entropy in nats, crossed / total."""
    top = tl.max(peak, axis=0)
    shift = peak - top
    decay = tl.exp2(shift)
    weighted = tl.sum((weighted + total * shift) * decay, axis=0)
    crossed = tl.sum(crossed * decay, axis=0)
    total = tl.sum(total * decay, axis=0)
    log_total = tl.log2(total)
    return top + log_total, (log_total - weighted / total) * 0.6931471805599453, crossed / total


@triton.jit
def _statistics_kernel(
    student,
    student_stride,
    student_bias,
    student_scale_2,
    student_softcap,
    teacher,
    teacher_stride,
    teacher_bias,
    teacher_scale_2,
    teacher_softcap,
    sampled_ids,
    statistics,
    group_maxima,
    num_rows,
    vocab_size,
    num_groups,
    log_rest,
    log_alpha,
    HAS_TEACHER: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    STUDENT_HAS_BIAS: tl.constexpr,
    STUDENT_HAS_SOFTCAP: tl.constexpr,
    TEACHER_HAS_BIAS: tl.constexpr,
    TEACHER_HAS_SOFTCAP: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    LANES: tl.constexpr = BLOCK // 8
    LN_2: tl.constexpr = 0.6931471805599453
    row = tl.program_id(0)
    student_row = student + row.to(tl.int64) * student_stride
    teacher_row = teacher + row.to(tl.int64) * teacher_stride
    offsets = tl.arange(0, LANES)[:, None] * 8 + tl.arange(0, 8)[None, :]
    num_blocks = tl.cdiv(vocab_size, BLOCK)
    student_peak = tl.full([LANES], -1e30, tl.float32)
    student_total = tl.zeros([LANES], tl.float32)
    student_weighted = tl.zeros([LANES], tl.float32)
    teacher_peak = tl.full([LANES], -1e30, tl.float32)
    teacher_total = tl.zeros([LANES], tl.float32)
    teacher_weighted = tl.zeros([LANES], tl.float32)
    crossed = tl.zeros([LANES], tl.float32)
    for i in tl.range(num_blocks, num_stages=STAGES):
        columns = i * BLOCK + offsets
        student_2 = read_logits(
            student_row,
            columns,
            vocab_size,
            student_bias,
            student_scale_2,
            student_softcap,
            STUDENT_HAS_BIAS,
            STUDENT_HAS_SOFTCAP,
        )
        student_peak, student_total, student_weighted, student_terms, student_decay, largest = _update(
            student_2, student_peak, student_total, student_weighted
        )
        if HAS_GROUPS:
            groups = tl.reshape(largest, [BLOCK // GROUP_SIZE, GROUP_SIZE // 8])
            places = i * (BLOCK // GROUP_SIZE) + tl.arange(0, BLOCK // GROUP_SIZE)
            # Clamp -inf, so that entries of probability 0 rank above positions beyond the vocabulary.
            highest = tl.maximum(tl.max(groups, axis=1), -3.0e38)
            tl.store(group_maxima + row.to(tl.int64) * num_groups + places, highest, mask=places < num_groups)
        if HAS_TEACHER:
            teacher_2 = read_logits(
                teacher_row,
                columns,
                vocab_size,
                teacher_bias,
                teacher_scale_2,
                teacher_softcap,
                TEACHER_HAS_BIAS,
                TEACHER_HAS_SOFTCAP,
            )
            teacher_peak, teacher_total, teacher_weighted, teacher_terms, teacher_decay, _teacher_largest = _update(
                teacher_2, teacher_peak, teacher_total, teacher_weighted
            )
            if DIVERGENCE == 1:
                terms = tl.where(teacher_terms == 0.0, 0.0, teacher_terms * (teacher_2 - student_2))
                crossed = crossed * teacher_decay + tl.sum(terms, axis=1)
            if DIVERGENCE == 2:
                terms = tl.where(student_terms == 0.0, 0.0, student_terms * (student_2 - teacher_2))
                crossed = crossed * student_decay + tl.sum(terms, axis=1)

    token = tl.load(sampled_ids + row)
    student_log_sum_exp, student_entropy, student_crossed = _combine(
        student_peak, student_total, student_weighted, crossed
    )
    sampled_2 = read_logits(
        student_row,
        token,
        vocab_size,
        student_bias,
        student_scale_2,
        student_softcap,
        STUDENT_HAS_BIAS,
        STUDENT_HAS_SOFTCAP,
    )
    tl.store(statistics + row, student_log_sum_exp)
    tl.store(statistics + num_rows + row, (sampled_2 - student_log_sum_exp) * LN_2)
    tl.store(statistics + 2 * num_rows + row, student_entropy)
    if HAS_TEACHER:
        teacher_log_sum_exp, teacher_entropy, teacher_crossed = _combine(
            teacher_peak, teacher_total, teacher_weighted, crossed
        )
        sampled_2 = read_logits(
            teacher_row,
            token,
            vocab_size,
            teacher_bias,
            teacher_scale_2,
            teacher_softcap,
            TEACHER_HAS_BIAS,
            TEACHER_HAS_SOFTCAP,
        )
        tl.store(statistics + 3 * num_rows + row, teacher_log_sum_exp)
        tl.store(statistics + 4 * num_rows + row, (sampled_2 - teacher_log_sum_exp) * LN_2)
        tl.store(statistics + 5 * num_rows + row, teacher_entropy)
        # Index 6 is the divergence. Index 7 is the sum of its derivatives by the log-probabilities, if the gradient
        # needs it (for reverse KL without the sum of the probabilities, 1).
        if DIVERGENCE == 1:
            divergence = (teacher_crossed - teacher_log_sum_exp + student_log_sum_exp) * LN_2
            tl.store(statistics + 6 * num_rows + row, divergence)
        if DIVERGENCE == 2:
            divergence = (student_crossed - student_log_sum_exp + teacher_log_sum_exp) * LN_2
            tl.store(statistics + 6 * num_rows + row, divergence)
            tl.store(statistics + 7 * num_rows + row, divergence)
        if DIVERGENCE == 3:
            of_student = tl.zeros([LANES], tl.float32)
            of_teacher = tl.zeros([LANES], tl.float32)
            for i in tl.range(num_blocks, num_stages=STAGES):
                columns = (num_blocks - 1 - i) * BLOCK + offsets
                student_2 = read_logits(
                    student_row,
                    columns,
                    vocab_size,
                    student_bias,
                    student_scale_2,
                    student_softcap,
                    STUDENT_HAS_BIAS,
                    STUDENT_HAS_SOFTCAP,
                )
                teacher_2 = read_logits(
                    teacher_row,
                    columns,
                    vocab_size,
                    teacher_bias,
                    teacher_scale_2,
                    teacher_softcap,
                    TEACHER_HAS_BIAS,
                    TEACHER_HAS_SOFTCAP,
                )
                student_2 += log_rest - student_log_sum_exp
                teacher_2 += log_alpha - teacher_log_sum_exp
                student_terms, teacher_terms, ratio = compare_with_mixture(student_2, teacher_2)
                larger = tl.exp2(tl.maximum(student_2, teacher_2))
                smaller = tl.where(larger == 0.0, 0.0, larger * ratio)  # the ratio of two zeros is NaN
                leads = student_2 >= teacher_2
                student_share = tl.where(leads, larger, smaller)
                teacher_share = tl.where(leads, smaller, larger)
                student_terms -= log_rest
                teacher_terms -= log_alpha
                of_student += tl.sum(tl.where(student_share == 0.0, 0.0, student_share * student_terms), axis=1)
                of_teacher += tl.sum(tl.where(teacher_share == 0.0, 0.0, teacher_share * teacher_terms), axis=1)
            derivative = LN_2 * tl.sum(of_student, axis=0)
            tl.store(statistics + 6 * num_rows + row, derivative + LN_2 * tl.sum(of_teacher, axis=0))
            tl.store(statistics + 7 * num_rows + row, derivative)
