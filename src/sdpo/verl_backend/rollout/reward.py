"""verl's reward function that asks a task of ours."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

from sdpo.config.data import RewardConfig
from sdpo.rewards.async_scoring import AsyncScorer, is_asynchronous
from sdpo.rewards.base import RewardOutput, Row, load_task
from sdpo.rewards.scoring import score_once
from sdpo.rewards.scoring_process import ScoringProcess

_loading = threading.Lock()


@functools.cache
def _load(task: str, args: str, timeout: float | None) -> Callable[[Row, str], RewardOutput]:
    reward_manager = load_task(task, json.loads(args))
    if is_asynchronous(reward_manager):
        return AsyncScorer(reward_manager, timeout).compute_score
    if timeout is not None:
        return ScoringProcess(task, args, timeout).compute_score
    return functools.partial(score_once, reward_manager, timeout=None)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str | None,
    extra_info: Mapping[str, Any] | None = None,
    *,
    task: str,
    task_args: str = "{}",
    timeout_s: float | None = RewardConfig.timeout_s,
    **_: Any,
) -> dict[str, Any]:
    """Grade a response for ``reward.custom_reward_function``; what follows ``*`` by ``reward_kwargs``.

    verl does not hand over the prompt: ``row.prompt`` is empty here, and what a grader needs of it must stand in
    ``extra_info``. verl calls this in a thread, where nothing can be interrupted; so the task runs in a process of its
    own, one response at a time (``reward.num_workers`` at once), or on an event loop if its ``grade`` is a coroutine
    function.

    Args:
        task: name, module or file of a task.
        task_args: of the task, as JSON.
        timeout_s: seconds that one response may take; without one the task runs in verl's threads.

    Returns:
        ``score``, ``acc`` (the same, which verl reports by that name) and ``feedback`` (empty if there is none).

    Raises:
        RewardFailure: there is no grade; ``agent_workers.py`` makes a failed one of it.
        DataError: the task cannot be loaded, or refuses its data.
    """
    row = Row(data_source, [], {"ground_truth": ground_truth}, extra_info=extra_info or {})
    with _loading:
        score_row = _load(task, task_args, timeout_s)
    grade = score_row(row, solution_str)
    return {"score": grade.score, "acc": grade.score, "feedback": grade.feedback or ""}
