"""Reward functions that are coroutine functions: run concurrently, on an event loop in a separate thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import threading
import time
from collections.abc import Callable

from sdpo.errors import SDPOError
from sdpo.rewards.base import RewardOutput, Row, Task, parse_reward
from sdpo.rewards.scoring import RewardFailure, RewardTimeout, describe_timeout, name_failure, name_row

# Seconds beyond the timeout after which the event loop counts as blocked.
GRACE_SECONDS = 2.0


def is_asynchronous(task: Task) -> bool:
    """Whether the task's ``compute_score`` must be awaited."""
    return inspect.iscoroutinefunction(task.compute_score)


class AsyncScorer:
    """Scores responses with a coroutine function, any number concurrently; thread-safe.

    A coroutine that takes too long is cancelled. A coroutine that blocks its event loop cannot be
    cancelled: the loop is abandoned with all its coroutines, and the next response starts a new loop.

    Args:
        task: the reward function.
        timeout: seconds per response; None for no limit.
    """

    def __init__(self, task: Task, timeout: float | None) -> None:
        self._task = task
        self._timeout = timeout
        self._starting = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def compute_score(self, row: Row, response: str) -> RewardOutput:
        """Score one response.

        Raises:
            RewardFailure, SDPOError: see ``score_once``.
        """
        return self.begin(row, response)()

    def begin(self, row: Row, response: str) -> Callable[[], RewardOutput]:
        """Start to score one response; the returned function waits for the result or raises."""
        loop = self._get_loop()
        future = asyncio.run_coroutine_threadsafe(self._score(row, response), loop)
        end = None if self._timeout is None else time.monotonic() + self._timeout + GRACE_SECONDS

        def finish() -> RewardOutput:
            try:
                return future.result(None if end is None else max(0.0, end - time.monotonic()))
            except concurrent.futures.TimeoutError:
                assert self._timeout is not None
                self._discard_loop(loop)
                reason = f"{describe_timeout(self._timeout)}, and it blocks the event loop"
                raise RewardFailure(f"{name_row(row)}: {reason}", RewardTimeout.__name__) from None

        return finish

    async def _score(self, row: Row, response: str) -> RewardOutput:
        async def attempt() -> RewardOutput | BaseException:
            try:
                return parse_reward(await self._task.compute_score(row, response))
            except (Exception, SystemExit) as error:  # a SystemExit would end the loop
                return error

        call = asyncio.ensure_future(attempt())
        done, _ = await asyncio.wait({call}, timeout=self._timeout)
        if not done:
            call.cancel()
            outcome: RewardOutput | BaseException = RewardTimeout()
        else:
            outcome = asyncio.CancelledError() if call.cancelled() else call.result()
        if isinstance(outcome, RewardOutput):
            return outcome
        if isinstance(outcome, SDPOError):
            raise outcome
        raise name_failure(outcome, self._task, row, self._timeout) from outcome

    def _get_loop(self) -> asyncio.AbstractEventLoop:
        with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="async-scoring", daemon=True).start()
            return self._loop

    def _discard_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._starting:
            if self._loop is loop:
                self._loop = None
