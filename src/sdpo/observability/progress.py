"""Interface through which a run reports messages, progress and metrics; the console implements it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class ProgressCallback(Protocol):
    """Receives what a run reports."""

    def message(self, text: str) -> None:
        """Receive a line of text, e.g. that a checkpoint was written."""

    def progress(self, description: str, done: int, total: int) -> None:
        """Receive the progress of a preparation, e.g. of pretraining; it is complete when ``done`` equals ``total``."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Receive a row of ``metrics.jsonl``; step 0 is the validation before training."""


class NullCallback:
    """Discards all reports."""

    def message(self, text: str) -> None:
        pass

    def progress(self, description: str, done: int, total: int) -> None:
        pass

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        pass
