"""The teacher: which weights it uses, and how they follow the student's.

An average in bfloat16 would stay constant: at rate 0.05 most changes are below half a unit in the last place. So the
average is kept in float32 for every model dtype, and the weights of the forward pass are cast from it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sdpo.config.self_distillation import SelfDistillationConfig

# At most this many entries of the student are cast to the average's data type at once: 256 MiB in float32.
ENTRIES_AT_ONCE = 2**26

# Modules and the coefficients of their logits in the sum.
LogitMixture = Sequence[tuple[nn.Module, float]]


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
    for pairs in _group(_cut(teachers, students)):
        casted = [s.to(device=t.device, dtype=t.dtype) for t, s in pairs]
        torch._foreach_lerp_([t for t, _ in pairs], casted, ema_rate)


def _cut(teachers: Sequence[Tensor], students: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of tensors, with large tensors split along their first axis."""
    for teacher, student in zip(teachers, students, strict=True):
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


class TeacherWeights(Protocol):
    """Teacher tensors, by name, that follow the student's, and how the teacher's module applies them."""

    @property
    def values(self) -> Mapping[str, Tensor]:
        """The teacher's tensors; float32 or float64 if they are averaged."""

    @property
    def in_module(self) -> bool:
        """Whether ``values`` are the module's parameters, so that saving the module saves them."""

    def read(self, student: nn.Module) -> Sequence[Tensor]:
        """The student's tensors, with the shapes and order of ``values``."""

    def apply(self) -> None:
        """Make the module compute with ``values``."""


class ModuleWeights:
    """All parameters of the teacher's module; if it is in half precision, the average is a float32 copy.

    Parameters may be shards (DTensor): each rank updates its own shards, without communication.
    """

    def __init__(self, module: nn.Module, averaged: bool) -> None:
        self._module = module
        params = get_shards(module)
        half = averaged and any(p.dtype not in (torch.float32, torch.float64) for p in params.values())
        self._average = {name: p.float() for name, p in params.items()} if half else None

    @property
    def values(self) -> Mapping[str, Tensor]:
        return self._average if self._average is not None else get_shards(self._module)

    @property
    def in_module(self) -> bool:
        return self._average is None

    def read(self, student: nn.Module) -> Sequence[Tensor]:
        return list(get_shards(student).values())

    def apply(self) -> None:
        if self._average is not None:
            _copy(get_shards(self._module).values(), self._average.values())


class Teacher:
    """The teacher that ``teacher_regularization`` names.

    It holds one frozen module; the live teacher, which is the student itself, holds none. ``policy`` returns the models
    of the teacher's distribution. ``step`` follows the student once per rollout batch.

    Args:
        module: with the student's initial weights, without gradients; None only for the live teacher.
        config: kind and rate of the teacher.
        weights: the tensors that follow the student; all of the module's parameters if None.

    Attributes:
        kind: ``teacher_regularization``; ``frozen`` after ``freeze``.
        num_steps: number of calls of ``step``.
        weights: None if no weights follow: live, frozen, trust region.
    """

    def __init__(
        self, module: nn.Module | None, config: SelfDistillationConfig, weights: TeacherWeights | None = None
    ) -> None:
        self.kind = config.teacher_regularization
        self.rate = config.ema_update_rate
        self.snapshot_every = config.teacher_sync_steps
        self.num_steps = 0
        self.module = module
        assert (module is None) == (self.kind == "live"), "only the live teacher has no module"
        self.weights: TeacherWeights | None = None
        if module is not None and follows(config):
            self.weights = weights or ModuleWeights(module, averaged=self.kind == "ema")

    def policy(self, student: nn.Module) -> LogitMixture:
        """Modules and the coefficients of their logits: one module, or two for the trust region.

        Trust region: lerp(reference model's logits, student's logits, rate), a geometric mixture of the distributions.
        Source: SDPO (arXiv 2601.20802), the regularised teacher.
        """
        if self.module is None:
            return [(student, 1.0)]
        if self.kind == "trust-region":
            return [(self.module, 1.0 - self.rate), (student, self.rate)]
        return [(self.module, 1.0)]

    @torch.no_grad()
    def step(self, student: nn.Module) -> None:
        """Follow the student after all optimizer steps of a rollout batch."""
        self.num_steps += 1
        if self.weights is None:
            return
        if self.kind == "ema":
            update_teacher_ema(self.weights.values.values(), self.weights.read(student), self.rate)
        elif self.kind == "snapshot" and self.num_steps % self.snapshot_every == 0:
            _copy(self.weights.values.values(), self.weights.read(student))
        else:
            return
        self.weights.apply()

    def freeze(self, initial: nn.Module | None = None) -> None:
        """Stop following. An average or a snapshot keeps its weights; the trust region becomes the reference model.

        The live teacher has no weights, so it becomes ``initial``: the reference model, without gradients.
        """
        self.module = self.module if self.module is not None else initial
        assert self.module is not None, "freezing the live teacher needs the reference model"
        self.kind = "frozen"

    def state_dict(self) -> dict[str, Any]:
        """Kind, number of steps, and the following weights if saving the module does not save them."""
        outside = None if self.weights is None or self.weights.in_module else dict(self.weights.values)
        return {"kind": self.kind, "num_steps": self.num_steps, "weights": outside}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from ``state_dict``; the caller loads the module's parameters."""
        self.num_steps = state["num_steps"]
        if self.weights is not None and not self.weights.in_module:
            values = self.weights.values
            _copy(values.values(), [state["weights"][name] for name in values])
            self.weights.apply()


def follows(config: SelfDistillationConfig) -> bool:
    """Whether the teacher's module changes during training."""
    return config.teacher_regularization in ("ema", "snapshot")


def build_teacher(student: nn.Module, config: SelfDistillationConfig) -> Teacher:
    """Build the teacher in one process; its module starts as a copy of the student."""
    is_live = config.teacher_regularization == "live"
    return Teacher(None if is_live else copy.deepcopy(student).requires_grad_(False).eval(), config)


def get_shards(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, or this rank's shards of them."""
    return {name: p.to_local() if isinstance(p, DTensor) else p.data for name, p in module.named_parameters()}


def _copy(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
