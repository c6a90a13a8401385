"""Reward function for verl that calls one of sdpo's tasks."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

from sdpo.config.data import RewardConfig
from sdpo.rewards.async_scoring import AsyncScorer, is_asynchronous
from sdpo.rewards.base import RewardOutput, Row, describe_unknown_key, load_task
from sdpo.rewards.scoring import score_once
from sdpo.rewards.scoring_process import ScoringProcess

_loading = threading.Lock()


@functools.cache
def _load(task: str, args: str, timeout: float | None) -> Callable[[Row, str], RewardOutput]:
    loaded = load_task(task, json.loads(args))
    if is_asynchronous(loaded):
        return AsyncScorer(loaded, timeout).compute_score
    if timeout is not None:
        return ScoringProcess(task, args, timeout).compute_score
    return functools.partial(score_once, loaded, timeout=None)


@functools.cache  # once per process
def _report(key: str) -> None:
    print(describe_unknown_key(key), flush=True)


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
    """Score a response, as verl's ``reward.custom_reward_function``; keyword arguments come from ``reward_kwargs``.

    verl does not pass the prompt: ``row.prompt`` is empty, and a task that needs it must read it from ``extra_info``.
    verl calls this function in a thread, which cannot be interrupted. So the task runs in a separate process for each
    of ``reward.num_workers``, one response at a time, or on an event loop if its ``compute_score`` is a coroutine
    function.

    Args:
        data_source: of the row, as the other arguments before ``*``.
        task: name, module or file of a task.
        task_args: of the task, as JSON.
        timeout_s: limit for one response, in seconds; None runs the task in verl's threads.

    Returns:
        ``score``, ``acc`` (equal, since verl reports accuracy under this name) and ``feedback`` (may be empty).

    Raises:
        RewardFailure: there is no score; ``agent_workers.py`` records a failed reward.
        DataError: the task cannot be loaded, or refuses its data.
    """
    row = Row(data_source, [], {"ground_truth": ground_truth}, extra_info=extra_info or {})
    with _loading:
        score_row = _load(task, task_args, timeout_s)
    output = score_row(row, solution_str)
    for key in output.unknown_keys:
        _report(key)
    return {"score": output.score, "acc": output.score, "feedback": output.feedback or ""}
