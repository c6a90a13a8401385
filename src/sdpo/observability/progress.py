"""Interface through which a run reports progress and metrics; the console implements it. Messages are log records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class ProgressCallback(Protocol):
    """Receives what a run reports."""

    def on_progress(self, description: str, done: int, total: int) -> None:
        """Receive the progress of a preparation, e.g. of pretraining; it is complete when ``done`` equals ``total``."""

    def on_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Receive a row of ``metrics.jsonl``; step 0 is the validation before training."""


class NullCallback:
    """Discards all reports."""

    def on_progress(self, description: str, done: int, total: int) -> None:
        pass

    def on_metrics(self, step: int, values: Mapping[str, float]) -> None:
        pass
