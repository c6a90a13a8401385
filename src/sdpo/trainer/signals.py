"""SIGINT and SIGTERM as ``KeyboardInterrupt``, deferred while the student's weights are inconsistent."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SignalHandler:
    """Raises ``KeyboardInterrupt`` at a signal; between ``defer`` and ``deliver``, only at a second signal.

    Use it as a context manager.

    Attributes:
        is_deferring: whether a signal would be deferred.
        name: of the signal that arrived; None before a signal.
    """

    def __init__(self) -> None:
        self.is_deferring = False
        self.name: str | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> SignalHandler:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            self._handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """Defer the first signal from now on."""
        self.is_deferring = True

    def deliver(self) -> None:
        """Stop deferring.

        Raises:
            KeyboardInterrupt: a signal was deferred.
        """
        self.is_deferring = False
        if self.name is not None:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_first = self.name is None
        self.name = signal.Signals(number).name
        if not is_first or not self.is_deferring:
            raise KeyboardInterrupt
