"""What is done about an alarm: it is told, written down, counted, and acted upon."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from sdpo.observability import metrics
from sdpo.observability.health import HealthEvent, HealthMonitor
from sdpo.observability.json_lines import read_json_lines, write_json_lines
from sdpo.observability.progress import ProgressCallback

HEALTH_EVENTS_FILE = "health_events.jsonl"


class Actor(Protocol):
    """What an action changes: the weight of the distillation loss, the teacher, and with a live one the student."""

    @property
    def teacher_is_frozen(self) -> bool:
        """Whether ``freeze_teacher`` has been called."""

    def lower_distillation(self) -> None:
        """Multiply the weight of the distillation loss by ``health.reduce_factor``, not below the floor."""

    def snapshot_best(self) -> None:
        """Remember the student as it is, if it may have to go back there."""

    def freeze_teacher(self) -> None:
        """Let the teacher follow the student no more."""


class HealthCallback:
    """Watches a run and does what ``health`` says.

    Args:
        monitor: which raises the alarms.
        actor: whose distillation weight is lowered and whose teacher is frozen.
        record: writes an alarm down.
        observer: who is told.

    Attributes:
        stopped_by: the alarm that ends the run, once there is one.
        best_accuracy: the best held-out accuracy so far, greedy, mean over data sources; None before an evaluation.
    """

    def __init__(
        self,
        monitor: HealthMonitor,
        actor: Actor,
        record: Callable[[Mapping[str, Any]], None],
        observer: ProgressCallback,
    ) -> None:
        self.monitor = monitor
        self.stop_event: HealthEvent | None = None
        self.best_accuracy: float | None = None
        self._actor = actor
        self._record = record
        self._observer = observer

    def watch(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Look at a step's metrics and act; gives metrics of its own."""
        self.track_best(values)
        alarms = self.monitor.check(step, values)
        for alarm in alarms:
            self._observer.message(f"step {step}: {alarm.rule}: {alarm.reason}; {_DONE[alarm.action]}")
            self._record(dataclasses.asdict(alarm))
            self._act(alarm)
        return {
            metrics.NUM_WARNINGS: float(len(alarms)),
            metrics.TEACHER_FROZEN: float(self._actor.teacher_is_frozen),
        }

    def track_best(self, values: Mapping[str, float]) -> None:
        """Have the actor remember the student if these are the metrics of its best evaluation so far."""
        accuracy = metrics.find_score(values)
        # Of equals the first: it is furthest from whatever is to come.
        if accuracy is not None and (self.best_accuracy is None or accuracy > self.best_accuracy):
            self.best_accuracy = accuracy
            self._actor.snapshot_best()

    def describe_stop(self) -> str | None:
        """The alarm that ends the run and its reason; None if there is none."""
        alarm = self.stop_event
        return f"{alarm.rule}: {alarm.reason}" if alarm is not None else None

    def state_dict(self) -> dict[str, Any]:
        """All that it remembers, in JSON's types."""
        return {"monitor": self.monitor.state_dict(), "best_accuracy": self.best_accuracy}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.monitor.load_state_dict(state["monitor"])
        self.best_accuracy = state["best_accuracy"]

    def _act(self, alarm: HealthEvent) -> None:
        if alarm.action == "reduce_weight":
            self._actor.lower_distillation()
        elif alarm.action == "freeze_teacher":
            self._actor.freeze_teacher()
        elif alarm.action == "stop":
            self.stop_event = self.stop_event or alarm


_DONE = {
    "warn": "nothing is done about it (docs/health.md)",
    "reduce_weight": "the distillation weight is lowered",
    "freeze_teacher": "the teacher is frozen",
    "stop": "the run stops here",
}


def drop_events_after(path: Path, step: int) -> None:
    """Remove from the file of alarms those of later steps, which a resumed run takes anew."""
    if path.exists():
        write_json_lines(path, [alarm for alarm in read_json_lines(path) if alarm["step"] <= step])
