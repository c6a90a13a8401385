"""One call of a grader: an exception, a hang and a return value that is no score are told apart from a grade."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from sdpo.errors import SDPOError
from sdpo.rewards.base import RewardOutput, Row, Task, find_place, parse_reward

TIMER_INTERVAL = 1.0  # seconds after which a call that swallowed the alarm gets another


class RewardTimeout(BaseException):
    """A grader took too long. No ``Exception``: graders catch those, and would go on."""


class RewardFailure(Exception):
    """A grader gave no grade; the text says for which row and why.

    Attributes:
        kind: the type of the error and the line of the grader.
    """

    def __init__(self, reason: str, kind: str = "") -> None:
        super().__init__(reason)
        self.kind = kind


def score_once(task: Task, row: Row, response: str, timeout: float | None) -> RewardOutput:
    """Grade one response.

    Raises:
        RewardFailure: an exception of the grader (``SystemExit`` too), a call longer than ``timeout`` seconds, or a
            return value that ``parse_reward`` refuses.
        DataError: the task's way to refuse its data.
    """
    try:
        return parse_reward(_call_within(timeout, task.compute_score, row, response))
    except SDPOError:
        raise
    except (Exception, SystemExit, RewardTimeout) as error:
        raise name_failure(error, task, row, timeout) from error


def name_failure(error: BaseException, task: Task, row: Row, timeout: float | None) -> RewardFailure:
    """What a grader raised, or that it took too long, for which row and where."""
    where = find_place(error, getattr(getattr(task.compute_score, "__code__", None), "co_filename", None))
    reason = f"{_describe(error, timeout)}{where and f' ({where})'}"
    return RewardFailure(f"{name_row(row)}: {reason}", f"{type(error).__name__} {where}")


def name_row(row: Row) -> str:
    """How an error names a row."""
    return row.origin or row.data_source


def _call_within(seconds: float | None, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function and interrupt it after so many seconds.

    Only Python's main thread on a system with SIGALRM can be interrupted, and not within a single call of C code;
    elsewhere the function takes as long as it takes. One that sets an alarm of its own replaces this one.

    Raises:
        RewardTimeout: it took longer.
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
            armed = False  # an alarm that comes while the earlier one is put back would leave it half done
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler if handler is not None else signal.SIG_DFL)
        if delay:
            signal.setitimer(signal.ITIMER_REAL, max(delay - (time.monotonic() - began), 1e-3), interval)


def describe_timeout(timeout: float) -> str:
    """What an error says of a grader that took too long."""
    return f"no score within reward.timeout_s={timeout:g} seconds"


def _describe(error: BaseException, timeout: float | None) -> str:
    if isinstance(error, RewardTimeout):
        assert timeout is not None
        return describe_timeout(timeout)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text:.300}" if text else type(error).__name__
