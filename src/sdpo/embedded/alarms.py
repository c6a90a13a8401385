"""What is done about an alarm: it is told, written down, counted, and acted upon."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from sdpo import metrics
from sdpo.embedded.learner import Learner
from sdpo.health import Alarm, HealthMonitor
from sdpo.observer import Observer


class Guard:
    """Watches a run and does what ``health`` says.

    Args:
        monitor: which raises the alarms.
        learner: whose distillation weight is lowered and whose teacher is frozen.
        record: writes an alarm down.
        observer: who is told.

    Attributes:
        stopped_by: the alarm that ends the run, once there is one.
        best_accuracy: the best held-out accuracy so far, greedy, mean over data sources; None before an evaluation.
    """

    def __init__(
        self,
        monitor: HealthMonitor,
        learner: Learner,
        record: Callable[[Mapping[str, Any]], None],
        observer: Observer,
    ) -> None:
        self.monitor = monitor
        self.stopped_by: Alarm | None = None
        self.best_accuracy: float | None = None
        self._learner = learner
        self._record = record
        self._observer = observer

    def watch(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Look at a step's metrics and act; gives metrics of its own."""
        self._compare(values)
        alarms = self.monitor.check(step, values)
        for alarm in alarms:
            self._observer.message(f"step {step}: {alarm.rule}: {alarm.reason}; {_DONE[alarm.action]}")
            self._record(dataclasses.asdict(alarm))
            self._act(alarm)
        return {
            metrics.ALARMS: float(len(alarms)),
            metrics.TEACHER_FROZEN: float(self._learner.teacher_is_frozen),
        }

    def state_dict(self) -> dict[str, Any]:
        """All that it remembers, in JSON's types."""
        return {"monitor": self.monitor.state_dict(), "best_accuracy": self.best_accuracy}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.monitor.load_state_dict(state["monitor"])
        self.best_accuracy = state["best_accuracy"]

    def _compare(self, values: Mapping[str, float]) -> None:
        accuracy = metrics.find_score(values)
        # Of equals the first: it is furthest from whatever is to come.
        if accuracy is not None and (self.best_accuracy is None or accuracy > self.best_accuracy):
            self.best_accuracy = accuracy
            self._learner.keep_as_best()

    def _act(self, alarm: Alarm) -> None:
        if alarm.action == "lower":
            self._learner.lower_distillation()
        elif alarm.action == "freeze":
            self._learner.freeze_teacher()
        elif alarm.action == "stop":
            self.stopped_by = self.stopped_by or alarm


_DONE = {
    "warn": "nothing is done about it (docs/health.md)",
    "lower": "the distillation weight is lowered",
    "freeze": "the teacher is frozen",
    "stop": "the run stops here",
}
