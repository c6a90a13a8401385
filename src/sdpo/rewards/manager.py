"""Reward manager: calls the reward function; failed calls are counted and leave their response without a score."""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Callable, Sequence

from sdpo.config.data import RewardConfig
from sdpo.errors import DataError
from sdpo.rewards.async_scoring import AsyncScorer, is_asynchronous
from sdpo.rewards.base import RewardOutput, Row, Task, describe_unknown_key
from sdpo.rewards.scoring import RewardFailure, score_once

logger = logging.getLogger(__name__)

FAILED = RewardOutput(math.nan)


class RewardManager:
    """Scores responses with a task's reward function.

    The first failure of each kind, an exception type at a line of the task, is logged as a warning.

    Coroutine functions score all responses of a step concurrently, other functions one response at a time. A call fails
    by an exception (``SystemExit`` included), by exceeding ``reward.timeout_s``, or by a return value that
    ``parse_reward`` refuses. An ``SDPOError`` is not a failure: it is how a task refuses its data, and ends the run.

    Args:
        task: the reward function.
        config: timeout, and the fraction of failures above which the run is aborted.

    Attributes:
        num_failures: number of failed calls so far.
    """

    def __init__(self, task: Task, config: RewardConfig) -> None:
        self._begin = _choose_begin(task, config.timeout_s)
        self._config = config
        self._reported: set[str] = set()
        self.num_failures = 0

    def compute_score(self, responses: Sequence[tuple[Row, str]]) -> list[RewardOutput]:
        """Score responses to rows, in order; the score of a failed call is NaN.

        Raises:
            DataError: more than ``reward.max_failure_fraction`` of the calls failed; the rest is not scored.
        """
        outputs = []
        num_failed = 0
        # Copies, because a reward function may write to its row.
        for finish in [self._begin(copy.deepcopy(row), response) for row, response in responses]:
            try:
                outputs.append(finish())
                self._report_unknown_keys(outputs[-1])
            except RewardFailure as failure:
                outputs.append(FAILED)
                num_failed += 1
                self.num_failures += 1
                if num_failed > self._config.max_failure_fraction * len(responses):
                    raise DataError(
                        f"data.task: scoring failed for {num_failed} of the {len(outputs)} "
                        f"responses scored so far, of {len(responses)} in all, which is more than "
                        f"reward.max_failure_fraction={self._config.max_failure_fraction:g}; the last: {failure}"
                    ) from failure.__cause__
                if failure.kind not in self._reported:
                    self._reported.add(failure.kind)
                    logger.warning(f"data.task: scoring failed, response not used: {failure}")
        return outputs

    def _report_unknown_keys(self, output: RewardOutput) -> None:
        for key in output.unknown_keys:
            if key not in self._reported:
                self._reported.add(key)
                logger.warning(describe_unknown_key(key))


def _choose_begin(task: Task, timeout: float | None) -> Callable[[Row, str], Callable[[], RewardOutput]]:
    """Return a function that begins to score a response and returns the function that completes it.

    If ``compute_score`` is not a coroutine function, the second function makes the complete call.
    """
    if is_asynchronous(task):
        return AsyncScorer(task, timeout).begin
    return lambda row, response: functools.partial(score_once, task, row, response, timeout)
