"""A single call of a reward function, with its timeout; failures become ``RewardFailure``."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from sdpo.errors import SDPOError
from sdpo.rewards.base import RewardOutput, Row, Task, find_place, parse_reward

TIMER_INTERVAL = 1.0  # seconds between further timeouts for a call that caught the first one


class RewardTimeout(BaseException):
    """A reward function took too long. Not an ``Exception``, which reward functions often catch."""


class RewardFailure(Exception):
    """A reward function returned no score; the message names the row and the reason.

    Attributes:
        kind: the error's type and line in the task, to recognise repeated failures.
    """

    def __init__(self, reason: str, kind: str = "") -> None:
        super().__init__(reason)
        self.kind = kind


def score_once(task: Task, row: Row, response: str, timeout: float | None) -> RewardOutput:
    """Score one response.

    Raises:
        RewardFailure: an exception in the reward function (``SystemExit`` included), a call longer than ``timeout``
            seconds, or a return value that ``parse_reward`` refuses.
        SDPOError: the task refuses its data.
    """
    try:
        return parse_reward(_call_within(timeout, task.compute_score, row, response))
    except SDPOError:
        raise
    except (Exception, SystemExit, RewardTimeout) as error:
        raise name_failure(error, task, row, timeout) from error


def name_failure(error: BaseException, task: Task, row: Row, timeout: float | None) -> RewardFailure:
    """Describe an exception or a timeout, with the row and a line of the task, by default the first of the function."""
    code = getattr(task.compute_score, "__code__", None)
    where = "" if code is None else find_place(error, code.co_filename) or f"{code.co_filename}:{code.co_firstlineno}"
    reason = f"{_describe(error, timeout)}{where and f' ({where})'}"
    return RewardFailure(f"{name_row(row)}: {reason}", f"{type(error).__name__} {where}")


def name_row(row: Row) -> str:
    """Name a row in an error message."""
    return row.origin or row.data_source


def _call_within(seconds: float | None, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function and interrupt it after this many seconds.

    Requires SIGALRM and Python's main thread; elsewhere the call has no time limit. A single call of C code is not
    interrupted. A function that sets SIGALRM itself replaces this timer.

    Raises:
        RewardTimeout: the call took longer.
    """
    if seconds is None or not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        return function(*arguments)
    armed = True

    def interrupt(signal_number: int, frame: FrameType | None) -> None:
        if armed:
            raise RewardTimeout

    began = time.monotonic()
    handler = signal.signal(signal.SIGALRM, interrupt)
    delay, interval = signal.setitimer(signal.ITIMER_REAL, seconds, TIMER_INTERVAL)
    try:
        try:
            return function(*arguments)
        finally:
            armed = False  # a signal while the earlier timer is restored would leave it incomplete
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler if handler is not None else signal.SIG_DFL)
        if delay:
            signal.setitimer(signal.ITIMER_REAL, max(delay - (time.monotonic() - began), 1e-3), interval)


def describe_timeout(timeout: float) -> str:
    """Describe a timeout."""
    return f"no score within reward.timeout_s={timeout:g} seconds"


def _describe(error: BaseException, timeout: float | None) -> str:
    if isinstance(error, RewardTimeout):
        assert timeout is not None
        return describe_timeout(timeout)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text:.300}" if text else type(error).__name__
