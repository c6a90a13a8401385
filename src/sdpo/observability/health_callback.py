"""Actions of failed health checks: each failure is logged, recorded, counted and acted upon."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from sdpo.observability import metrics
from sdpo.observability.health import HealthEvent, HealthMonitor
from sdpo.observability.json_lines import read_json_lines, write_json_lines

logger = logging.getLogger(__name__)

HEALTH_EVENTS_FILE = "health_events.jsonl"


class HealthActions(Protocol):
    """Actions of failed health checks: distillation coefficient, teacher, and with a live teacher the student."""

    @property
    def teacher_is_frozen(self) -> bool:
        """Whether ``freeze_teacher`` has been called."""

    def reduce_distillation(self) -> None:
        """Multiply the distillation coefficient by ``health.reduce_factor``, down to ``health.min_scale``."""

    def snapshot_best(self) -> None:
        """Keep a copy of the student's weights if ``freeze_teacher`` may have to restore them."""

    def freeze_teacher(self) -> None:
        """Stop updating the teacher."""


class HealthCallback:
    """Runs the health checks after each step and carries out their actions.

    Args:
        monitor: runs the checks.
        actions: carries out ``reduce_weight`` and ``freeze_teacher``.
        record: stores a health event.

    Attributes:
        stop_event: the event that ends the run; None until then.
        best_accuracy: best validation accuracy so far (``metrics.find_score``); None before the first validation.
    """

    def __init__(
        self,
        monitor: HealthMonitor,
        actions: HealthActions,
        record: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self.monitor = monitor
        self.stop_event: HealthEvent | None = None
        self.best_accuracy: float | None = None
        self._actions = actions
        self._record = record

    def watch(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Check the metrics of a step, act on failures, and return the metrics to add to the step's."""
        self.track_best(values)
        events = self.monitor.check(step, values)
        for event in events:
            logger.warning(f"step {step}: health.{event.rule}={event.action}: {event.reason}; {_DONE[event.action]}")
            self._record(dataclasses.asdict(event))
            self._act(event)
        return {
            metrics.NUM_WARNINGS: float(len(events)),
            metrics.TEACHER_FROZEN: float(self._actions.teacher_is_frozen),
        }

    def track_best(self, values: Mapping[str, float]) -> None:
        """Keep the student if these metrics have the best validation accuracy so far."""
        accuracy = metrics.find_score(values)
        # The first of equal accuracies: it is furthest from a later collapse.
        if accuracy is not None and (self.best_accuracy is None or accuracy > self.best_accuracy):
            self.best_accuracy = accuracy
            self._actions.snapshot_best()

    def describe_stop(self) -> str | None:
        """The check that ends the run and its reason; None if no check does."""
        return f"{self.stop_event.rule}: {self.stop_event.reason}" if self.stop_event is not None else None

    def state_dict(self) -> dict[str, Any]:
        """The complete state, in JSON's types."""
        return {"monitor": self.monitor.state_dict(), "best_accuracy": self.best_accuracy}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.monitor.load_state_dict(state["monitor"])
        self.best_accuracy = state["best_accuracy"]

    def _act(self, event: HealthEvent) -> None:
        if event.action == "reduce_weight":
            self._actions.reduce_distillation()
        elif event.action == "freeze_teacher":
            self._actions.freeze_teacher()
        elif event.action == "stop":
            self.stop_event = self.stop_event or event


_DONE = {
    "warn": "no action taken (docs/health.md)",
    "reduce_weight": "reducing the distillation coefficient",
    "freeze_teacher": "freezing the teacher",
    "stop": "stopping the run after this step",
}


def drop_events_after(path: Path, step: int) -> None:
    """Remove the events of later steps from a file, because a resumed run repeats these steps."""
    if path.exists():
        write_json_lines(path, [event for event in read_json_lines(path) if event["step"] <= step])
