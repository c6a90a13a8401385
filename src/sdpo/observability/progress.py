"""How a run tells whoever watches it what happens. Engines call it; the command line's console implements it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class ProgressCallback(Protocol):
    """What a run tells whoever watches it."""

    def message(self, text: str) -> None:
        """Something worth a line, such as a checkpoint that was written."""

    def progress(self, description: str, done: int, total: int) -> None:
        """How far preparation is, such as the pretraining of a tiny model; over once ``done`` reaches ``total``."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """A row as it is appended to ``metrics.jsonl``; step 0 is the evaluation before training."""


class NullCallback:
    """The observer of a run that nobody watches."""

    def message(self, text: str) -> None:
        pass

    def progress(self, description: str, done: int, total: int) -> None:
        pass

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        pass
