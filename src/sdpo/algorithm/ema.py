"""Moving average of the student's weights.

An average in bfloat16 would stay constant: at rate 0.05 most changes are below half a unit in the last place. So the
average is kept in float32 for every model dtype, and the weights of the forward pass are cast from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

# At most this many entries of the student are cast to the average's data type at once: 256 MiB in float32.
ENTRIES_AT_ONCE = 2**26


@torch.no_grad()
def update_teacher_ema(teacher_params: Iterable[Tensor], student_params: Iterable[Tensor], ema_rate: float) -> None:
    """teacher <- (1 - ema_rate) * teacher + ema_rate * student, in place.

    Args:
        teacher_params: float32 or float64 tensors.
        student_params: tensors of the same shapes in the same order, of any floating-point type.
        ema_rate: in [0, 1]; 0 keeps the teacher, 1 copies the student.

    Raises:
        ValueError: a teacher tensor in half precision, different shapes or numbers of tensors, or a rate out of range.

    Source: SDPO (arXiv 2601.20802), section 3: once per rollout batch, after all of its optimizer steps.
    """
    if not 0.0 <= ema_rate <= 1.0:
        raise ValueError(f"ema_rate must be in [0, 1], got {ema_rate!r}")
    teachers, students = list(teacher_params), list(student_params)
    if [t.shape for t in teachers] != [s.shape for s in students]:
        raise ValueError("teacher_params and student_params must have the same shapes, in the same order")
    half = [t.dtype for t in teachers if t.dtype not in (torch.float32, torch.float64)]
    if half:
        raise ValueError(
            f"teacher_params must be float32, got {half[0]}: small updates round to zero; pass a float32 copy"
        )
    average_pairs(zip(teachers, students, strict=True), ema_rate)


@torch.no_grad()
def average_pairs(pairs: Iterable[tuple[Tensor, Tensor]], ema_rate: float) -> None:
    """As ``update_teacher_ema``, without its checks, for pairs of teacher's and student's tensors.

    Pairs are read as the update proceeds, so that tensors that are computed on the way are not in memory together.
    """
    for group in _group(_split_large(pairs)):
        casted = [s.to(device=t.device, dtype=t.dtype) for t, s in group]
        torch._foreach_lerp_([t for t, _ in group], casted, ema_rate)


def _split_large(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Split large tensors along their first axis."""
    for teacher, student in pairs:
        if teacher.dim() == 0 or teacher.numel() <= ENTRIES_AT_ONCE:
            yield teacher, student.detach()
            continue
        size = max(ENTRIES_AT_ONCE * len(teacher) // teacher.numel(), 1)
        yield from zip(teacher.split(size), student.detach().split(size), strict=True)


def _group(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Group pairs up to ``ENTRIES_AT_ONCE`` entries, so that one operation updates many small tensors."""
    group: list[tuple[Tensor, Tensor]] = []
    count = 0
    for pair in pairs:
        if group and count + pair[0].numel() > ENTRIES_AT_ONCE:
            yield group
            group, count = [], 0
        group.append(pair)
        count += pair[0].numel()
    if group:
        yield group
