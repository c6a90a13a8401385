"""dL / d products, written over the student's products.

Let s and t be the probabilities of student and teacher, D the divergence, a = dL / dD, b = dL / d log s of the sampled
token, c = dL / dH and H the student's entropy. The gradient by the student's logits is

    forward KL      a (s - t)                          Jensen-Shannon  a s ((1 - alpha) log(s / m) - D'),
    reverse KL      a s (log(s / t) - D)                               D' = (1 - alpha) sum s log(s / m)

plus b (1 at the sampled token - s), minus c s (log s + H). It is multiplied by the logits' scale and the soft-cap's
derivative.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sdpo.kernels.cuda.logits import Logits, load_transformed_logits, read_logits
from sdpo.kernels.cuda.row_statistics import (
    Launch,
    RowStatistics,
    compare_with_mixture,
    mixture_logs,
    name_divergence,
    name_features,
)

GRADIENT_LAUNCH = Launch(4096, 16)  # the fastest of eight on an H200 (benchmarks/gpu/loss.py variants)


def write_logits_gradient(
    student: Logits,
    teacher: Logits | None,
    sampled_ids: Tensor,
    statistics: RowStatistics,
    coefficients: Tensor,
    *,
    alpha: float | None = None,
    launch: Launch | None = None,
) -> None:
    """Overwrite ``student.products`` with the gradient of n rows.

    Args:
        teacher: [n, V]; read only if ``alpha`` is given.
        sampled_ids: [n].
        coefficients: [3, n] or [4, n] float32, contiguous. Row 0: dL / d divergence. Row 1: factor of -s. Row 2: value
            added at the sampled token. Rows 1 and 2 are both b, except with top-k, where the caller overwrites the kept
            entries. Row 3: dL / d entropy, if the loss has an entropy term.
        alpha: of the divergence of whole distributions; None if the loss has no such term.
    """
    launch = launch or GRADIENT_LAUNCH
    rows, vocab_size = student.products.shape
    other = student if teacher is None or alpha is None else teacher
    products, stride, bias, scale_2, softcap = student.kernel_arguments()
    _gradient_kernel[(triton.cdiv(vocab_size, launch.block), rows)](
        products,
        stride,
        bias,
        scale_2,
        softcap,
        *other.kernel_arguments(),
        sampled_ids.contiguous(),
        statistics.packed,
        coefficients,
        student.scale,
        rows,
        vocab_size,
        1.0 - (alpha or 0.0),
        *mixture_logs(alpha),
        DIVERGENCE=name_divergence(alpha),
        HAS_ENTROPY=len(coefficients) == 4,
        **name_features(student, other),
        BLOCK=launch.block,
        num_warps=launch.num_warps,
    )


@triton.jit
def _gradient_kernel(
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
    coefficients,
    student_scale,
    num_rows,
    vocab_size,
    rest,
    log_rest,
    log_alpha,
    DIVERGENCE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    STUDENT_HAS_BIAS: tl.constexpr,
    STUDENT_HAS_SOFTCAP: tl.constexpr,
    TEACHER_HAS_BIAS: tl.constexpr,
    TEACHER_HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    LN_2: tl.constexpr = 0.6931471805599453
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1)
    student_row = student + row.to(tl.int64) * student_stride
    student_2, bent = load_transformed_logits(
        student_row,
        columns,
        vocab_size,
        student_bias,
        student_scale_2,
        student_softcap,
        STUDENT_HAS_BIAS,
        STUDENT_HAS_SOFTCAP,
    )
    student_2 -= tl.load(statistics + row)
    probs = tl.exp2(student_2)
    by_probs = tl.load(coefficients + num_rows + row) * student_scale
    by_sampled = tl.load(coefficients + 2 * num_rows + row) * student_scale
    gradient = -by_probs * probs
    if DIVERGENCE > 0:
        by_divergence = tl.load(coefficients + row) * student_scale
        teacher_2 = read_logits(
            teacher + row.to(tl.int64) * teacher_stride,
            columns,
            vocab_size,
            teacher_bias,
            teacher_scale_2,
            teacher_softcap,
            TEACHER_HAS_BIAS,
            TEACHER_HAS_SOFTCAP,
        )
        teacher_2 -= tl.load(statistics + 3 * num_rows + row)
        if DIVERGENCE == 1:
            gradient += by_divergence * (probs - tl.exp2(teacher_2))
        else:
            centre = tl.load(statistics + 7 * num_rows + row)
            if DIVERGENCE == 2:
                log_ratio = LN_2 * (student_2 - teacher_2)
            else:
                of_student, _of_teacher, _ratio = compare_with_mixture(student_2 + log_rest, teacher_2 + log_alpha)
                log_ratio = (rest * LN_2) * (of_student - log_rest)
            gradient += by_divergence * tl.where(probs == 0.0, 0.0, probs * (log_ratio - centre))
    if HAS_ENTROPY:
        by_entropy = tl.load(coefficients + 3 * num_rows + row) * student_scale
        above = LN_2 * student_2 + tl.load(statistics + 2 * num_rows + row)
        gradient -= by_entropy * tl.where(probs == 0.0, 0.0, probs * above)
    gradient += tl.where(columns == tl.load(sampled_ids + row), by_sampled, 0.0)
    if STUDENT_HAS_SOFTCAP:
        gradient *= 1.0 - bent * bent
    tl.store(student_row + columns, gradient.to(student.dtype.element_ty), mask=columns < vocab_size)
