"""The teacher: which weights it uses, and how they follow the student's."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sdpo.algorithm.ema import update_teacher_ema
from sdpo.algorithm.teacher_weights import ModuleWeights, TeacherWeights, copy_tensors
from sdpo.config.self_distillation import SelfDistillationConfig

# Modules and the coefficients of their logits in the sum.
LogitMixture = Sequence[tuple[nn.Module, float]]


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
            copy_tensors(self.weights.values.values(), self.weights.read(student))
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
            copy_tensors(values.values(), [state["weights"][name] for name in values])
            self.weights.apply()


def follows(config: SelfDistillationConfig) -> bool:
    """Whether the teacher's module changes during training."""
    return config.teacher_regularization in ("ema", "snapshot")


def build_teacher(student: nn.Module, config: SelfDistillationConfig) -> Teacher:
    """Build the teacher in one process; its module starts as a copy of the student."""
    is_live = config.teacher_regularization == "live"
    return Teacher(None if is_live else copy.deepcopy(student).requires_grad_(False).eval(), config)
