"""Actions of failed health checks on the native trainer's actor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdpo.config.monitoring import HealthConfig
from sdpo.trainer.actor.actor import Actor


class ActorHealthActions:
    """Carries out the actions of ``HealthCallback``.

    Args:
        actor: its distillation coefficient, teacher and student are changed.
        config: names the actions.

    Attributes:
        best_weights: trained weights of the student at its best validation so far; None without a copy.
    """

    def __init__(self, actor: Actor, config: HealthConfig) -> None:
        self.best_weights: dict[str, Tensor] | None = None
        self._actor = actor
        self._config = config

    @property
    def teacher_is_frozen(self) -> bool:
        """Whether ``freeze_teacher`` has been called."""
        teacher = self._actor.teacher
        return teacher is not None and teacher.kind != self._actor.loss.teacher_regularization

    def reduce_distillation(self) -> None:
        """Multiply the distillation coefficient by ``health.reduce_factor``, down to ``health.min_scale``."""
        self._actor.distillation_scale = self._config.reduce(self._actor.distillation_scale)

    def snapshot_best(self) -> None:
        """Copy the student's trained weights, if freezing a live teacher would restore them."""
        teacher = self._actor.teacher
        if self._config.may_freeze and teacher is not None and teacher.module is None:
            self.best_weights = {name: param.detach().clone() for name, param in self._trained_parameters()}

    @torch.no_grad()
    def freeze_teacher(self) -> None:
        """Stop the teacher's updates.

        A live teacher becomes the reference model, since a recent student may already have collapsed. The weights of
        the student's best validation are restored, since a collapsed student samples no successful rollouts.
        """
        if self._actor.teacher is None:
            return
        if self.best_weights is not None:
            for name, param in self._trained_parameters():
                param.copy_(self.best_weights[name])
            self.best_weights = None
        self._actor.teacher.freeze(self._actor.initial)

    def _trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, param) for name, param in self._actor.student.named_parameters() if param.requires_grad]
