"""Graders go wrong: one that raises, hangs or returns no score costs that response its grade, and is counted."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from sdpo.config import DataConfig
from sdpo.errors import UserError
from sdpo.observer import Observer
from sdpo.tasks.interface import Grade, Row, Task, find_place, parse_grade

FAILED = Grade(math.nan)
ALARM_INTERVAL = 1.0  # seconds after which a call that swallowed the alarm gets another


class GraderTimeout(BaseException):
    """A grader took too long. No ``Exception``: graders catch those, and would go on."""


class GradingFailed(Exception):
    """A grader gave no grade; the text says for which row and why.

    Attributes:
        kind: the type of the error and the line of the grader.
    """

    def __init__(self, reason: str, kind: str = "") -> None:
        super().__init__(reason)
        self.kind = kind


def grade_once(task: Task, row: Row, response: str, timeout: float | None) -> Grade:
    """Grade one response.

    Raises:
        GradingFailed: an exception of the grader (``SystemExit`` too), a call longer than ``timeout`` seconds, or a
            return value that ``parse_grade`` refuses.
        UserError: the task's way to refuse its data.
    """
    try:
        return parse_grade(_call_within(timeout, task.grade, row, response))
    except UserError:
        raise
    except (Exception, SystemExit, GraderTimeout) as error:
        where = find_place(error, getattr(getattr(task.grade, "__code__", None), "co_filename", None))
        reason = f"{_describe(error, timeout)}{where and f' ({where})'}"
        raise GradingFailed(f"{name_row(row)}: {reason}", f"{type(error).__name__} {where}") from error


def name_row(row: Row) -> str:
    """How an error names a row."""
    return row.origin or row.data_source


class Grader:
    """A task's ``grade``, whose failures are survived, told and counted.

    A failure is an exception (``SystemExit`` too), a call longer than ``data.grader_timeout``, or a return value that
    ``parse_grade`` refuses. A ``UserError`` is none: it is the task's way to refuse its data, and ends the run.

    Args:
        task: what grades.
        config: its name, the timeout and the share of failures that a run survives.
        observer: told of the first failure of each kind; a kind is a type of exception at a line of the grader.

    Attributes:
        num_failures: so far.
    """

    def __init__(self, task: Task, config: DataConfig, observer: Observer) -> None:
        self._task = task
        self._config = config
        self._observer = observer
        self._told: set[str] = set()
        self.num_failures = 0

    def grade(self, responses: Sequence[tuple[Row, str]]) -> list[Grade]:
        """A grade for each response to a row, in their order; the score of a failed one is NaN.

        Raises:
            UserError: more than ``data.max_grader_failures`` of them have failed; the rest is not graded.
        """
        grades = []
        num_failed = 0
        for row, response in responses:
            try:
                grades.append(grade_once(self._task, row, response, self._config.grader_timeout))
            except GradingFailed as failure:
                grades.append(FAILED)
                num_failed += 1
                self.num_failures += 1
                if num_failed > self._config.max_grader_failures * len(responses):
                    raise UserError(
                        f"data.task: {self._config.task}: grading failed for {num_failed} of the {len(grades)} "
                        f"responses graded so far, of {len(responses)} in all, which is more than "
                        f"data.max_grader_failures={self._config.max_grader_failures:g}; the last: {failure}"
                    ) from failure.__cause__
                if failure.kind not in self._told:
                    self._told.add(failure.kind)
                    self._observer.message(f"data.task: grading failed, which costs that response: {failure}")
        return grades


def _call_within(seconds: float | None, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function and interrupt it after so many seconds.

    Only Python's main thread on a system with SIGALRM can be interrupted, and not within a single call of C code;
    elsewhere the function takes as long as it takes. One that sets an alarm of its own replaces this one.

    Raises:
        GraderTimeout: it took longer.
    """
    if seconds is None or not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        return function(*arguments)
    armed = True

    def interrupt(signal_number: int, frame: FrameType | None) -> None:
        if armed:
            raise GraderTimeout

    began = time.monotonic()
    handler = signal.signal(signal.SIGALRM, interrupt)
    delay, interval = signal.setitimer(signal.ITIMER_REAL, seconds, ALARM_INTERVAL)
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
    return f"no grade within data.grader_timeout={timeout:g} seconds"


def _describe(error: BaseException, timeout: float | None) -> str:
    if isinstance(error, GraderTimeout):
        assert timeout is not None
        return describe_timeout(timeout)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text:.300}" if text else type(error).__name__
