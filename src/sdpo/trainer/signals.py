"""Ctrl-C and SIGTERM: at once where the student's weights are those of a whole step, else as soon as they are."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Turns both signals into ``KeyboardInterrupt``, which is held back between ``hold`` and ``release``.

    Use it as a context manager. Only the first signal is held back: a second one means now.

    Attributes:
        is_holding: whether the weights are between two steps.
        name: of the signal that came; None so far.
    """

    def __init__(self) -> None:
        self.is_holding = False
        self.name: str | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # only the main thread may say
            self._handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def hold(self) -> None:
        self.is_holding = True

    def release(self) -> None:
        """
        Raises:
            KeyboardInterrupt: a signal came in the meantime.
        """
        self.is_holding = False
        if self.name is not None:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_first = self.name is None
        self.name = signal.Signals(number).name
        if not is_first or not self.is_holding:
            raise KeyboardInterrupt
