"""The teacher: which weights it uses, and how they are updated."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sdpo.algorithm.ema import average_pairs
from sdpo.algorithm.teacher_weights import ModuleWeights, TeacherWeights, copy_tensors
from sdpo.config.self_distillation import SelfDistillationConfig

# Modules and the coefficients of their logits in the sum.
LogitMixture = Sequence[tuple[nn.Module, float]]


class Teacher:
    """The teacher that ``teacher_regularization`` names.

    It holds one frozen module; the live teacher, which is the student itself, holds none. ``policy`` returns the models
    of the teacher's distribution. ``update`` is called once per rollout batch.

    Args:
        module: with the student's initial weights, without gradients; None only for the live teacher.
        config: kind and rate of the teacher.
        weights: the tensors that are updated; all of the module's parameters if None.

    Attributes:
        kind: ``teacher_regularization``; ``frozen`` after ``freeze``.
        num_steps: number of calls of ``update``.
        weights: None if none are updated: live, frozen, trust region.
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
        if module is not None and is_updated(config):
            self.weights = weights or ModuleWeights(module, averaged=is_averaged(config))

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
    def update(self, student: nn.Module) -> None:
        """Average with, or copy, the student's weights after all optimizer steps of a rollout batch."""
        self.num_steps += 1
        if self.weights is None:
            return
        if self.kind == "ema":
            average_pairs(zip(self.weights.values.values(), self.weights.read_student(student), strict=True), self.rate)
        elif self.kind == "snapshot" and self.num_steps % self.snapshot_every == 0:
            copy_tensors(self.weights.values.values(), self.weights.read_student(student))
        else:
            return
        self.weights.write_module()

    def freeze(self, initial: nn.Module | None = None) -> None:
        """Stop the updates. An average or a snapshot keeps its weights; the trust region becomes the reference model.

        The live teacher has no weights, so it becomes ``initial``: the reference model, without gradients.
        """
        self.module = self.module if self.module is not None else initial
        assert self.module is not None, "freezing the live teacher needs the reference model"
        self.kind = "frozen"

    def state_dict(self) -> dict[str, Any]:
        """Kind, number of steps, and the updated weights if saving the module does not save them."""
        outside = None if self.weights is None or self.weights.saved_with_module else dict(self.weights.values)
        return {"kind": self.kind, "num_steps": self.num_steps, "weights": outside}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from ``state_dict``; the caller loads the module's parameters."""
        self.num_steps = state["num_steps"]
        if self.weights is not None and not self.weights.saved_with_module:
            values = self.weights.values
            copy_tensors(values.values(), [state["weights"][name] for name in values])
            self.weights.write_module()


def is_updated(config: SelfDistillationConfig) -> bool:
    """Whether the teacher's module changes during training."""
    return config.teacher_regularization in ("ema", "snapshot")


def is_averaged(config: SelfDistillationConfig) -> bool:
    """Whether the teacher's weights are an average, which is kept in float32 because updates round away in bfloat16."""
    return config.teacher_regularization == "ema"


def build_teacher(student: nn.Module, config: SelfDistillationConfig) -> Teacher:
    """Build the teacher in one process; its module starts as a copy of the student."""
    is_live = config.teacher_regularization == "live"
    return Teacher(None if is_live else copy.deepcopy(student).requires_grad_(False).eval(), config)
