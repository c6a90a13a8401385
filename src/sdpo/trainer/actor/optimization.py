"""The optimizer with its learning rate schedule and gradient clipping."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, get_scheduler

from sdpo.config.actor import OptimConfig
from sdpo.models.optimizer import UpdateRounding, build_optimizer, compile_on_gpus_only
from sdpo.models.warm_up import set_lr, start_warm_up_at_first_update
from sdpo.observability import metrics

logger = logging.getLogger(__name__)


class Optimization:
    """Updates a model's trained parameters.

    Args:
        model: parameters that require gradients are trained.
        config: optimizer, schedule and clipping.
        num_updates: optimizer steps of the complete run, for the schedule.
        seed: selects the weights on which rounding is measured.
    """

    def __init__(self, model: PreTrainedModel, config: OptimConfig, num_updates: int, seed: int) -> None:
        self.model = model
        self.optimizer = build_optimizer([param for param in model.parameters() if param.requires_grad], config)
        self.scheduler = get_scheduler(
            "constant_with_warmup" if config.lr_scheduler_type == "constant" else config.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=num_updates,
        )
        start_warm_up_at_first_update(self.scheduler, config.warmup_steps)
        self._max_grad_norm = config.max_grad_norm
        self._rounding = UpdateRounding(self.optimizer, logger.warning, seed)

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return float(self.scheduler.get_last_lr()[0])

    def step(self) -> dict[str, float]:
        """Clip the gradients and update the parameters, unless the gradient norm is non-finite; returns metrics."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._max_grad_norm))
        finite = math.isfinite(norm)
        if finite:
            with compile_on_gpus_only(self.model.device.type):
                self.optimizer.step()
            self.scheduler.step()
        values = {metrics.GRAD_NORM: norm, metrics.SKIPPED_UPDATES: float(not finite)}
        lost = self._rounding.take()
        return values if lost is None else values | {metrics.UPDATE_ROUNDING: lost}

    def state_dict(self) -> dict[str, Any]:
        """Moments and number of updates."""
        return {"moments": self.optimizer.state_dict()["state"], "num_updates": self.scheduler.last_epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore moments and position in the schedule; learning rate and weight decay come from the config."""
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state["moments"]})
        count = state["num_updates"]
        lrs = [lr * scale(count) for lr, scale in zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)]
        self.scheduler.load_state_dict(
            {**self.scheduler.state_dict(), "last_epoch": count, "_step_count": count + 1, "_last_lr": lrs}
        )
        set_lr(self.optimizer, lrs)
