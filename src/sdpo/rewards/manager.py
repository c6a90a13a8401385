"""Graders go wrong: one that raises, hangs or returns no score costs that response its grade, and is counted."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from sdpo.config.data import RewardConfig
from sdpo.errors import DataError
from sdpo.observability.progress import ProgressCallback
from sdpo.rewards.async_scoring import AsyncScorer, is_asynchronous
from sdpo.rewards.base import RewardOutput, Row, Task
from sdpo.rewards.scoring import RewardFailure, score_once

FAILED = RewardOutput(math.nan)


class RewardManager:
    """A task's ``grade``, whose failures are survived, told and counted.

    Coroutine functions grade all responses of a step side by side, others one after the other. A failure is an
    exception (``SystemExit`` too), a call longer than ``reward.timeout_s``, or a return value that
    ``parse_reward`` refuses. An ``SDPOError`` is none: it is the task's way to refuse its data, and ends the run.

    Args:
        task: what grades.
        config: its timeout, and the fraction of failures above which the run is aborted.
        observer: told of the first failure of each kind; a kind is a type of exception at a line of the grader.

    Attributes:
        num_failures: so far.
    """

    def __init__(self, task: Task, config: RewardConfig, observer: ProgressCallback) -> None:
        self._begin = _choose_begin(task, config.timeout_s)
        self._config = config
        self._observer = observer
        self._told: set[str] = set()
        self.num_failures = 0

    def compute_score(self, responses: Sequence[tuple[Row, str]]) -> list[RewardOutput]:
        """A grade for each response to a row, in their order; the score of a failed one is NaN.

        Raises:
            DataError: more than ``reward.max_failure_fraction`` of them have failed; the rest is not scored.
        """
        grades = []
        num_failed = 0
        for finish in [self._begin(row, response) for row, response in responses]:
            try:
                grades.append(finish())
            except RewardFailure as failure:
                grades.append(FAILED)
                num_failed += 1
                self.num_failures += 1
                if num_failed > self._config.max_failure_fraction * len(responses):
                    raise DataError(
                        f"data.task: scoring failed for {num_failed} of the {len(grades)} "
                        f"responses scored so far, of {len(responses)} in all, which is more than "
                        f"reward.max_failure_fraction={self._config.max_failure_fraction:g}; the last: {failure}"
                    ) from failure.__cause__
                if failure.kind not in self._told:
                    self._told.add(failure.kind)
                    self._observer.message(f"data.task: scoring failed, which costs that response: {failure}")
        return grades


def _choose_begin(task: Task, timeout: float | None) -> Callable[[Row, str], Callable[[], RewardOutput]]:
    """What begins to grade a response, and gives what ends it: the whole call, where ``grade`` is no coroutine."""
    if is_asynchronous(task):
        return AsyncScorer(task, timeout).begin
    return lambda row, response: functools.partial(score_once, task, row, response, timeout)
