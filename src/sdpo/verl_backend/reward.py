"""verl's reward function that asks a task of ours."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from sdpo.tasks.interface import Row, Task, grade_response, load_task


@functools.cache
def _load(task: str, args: str) -> Task:
    return load_task(task, json.loads(args))


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str | None,
    extra_info: Mapping[str, Any] | None = None,
    *,
    task: str,
    task_args: str = "{}",
    **_: Any,
) -> dict[str, Any]:
    """Grade a response for ``reward.custom_reward_function``; ``task`` and ``task_args`` (JSON) by ``reward_kwargs``.

    verl does not hand over the prompt: ``row.prompt`` is empty here, and what a grader needs of it must stand in
    ``extra_info``.

    Returns:
        ``score``, ``acc`` (the same, which verl reports by that name) and ``feedback`` (empty if there is none).
    """
    row = Row(data_source, [], {"ground_truth": ground_truth}, extra_info=extra_info or {})
    grade = grade_response(_load(task, task_args), row, solution_str)
    return {"score": grade.score, "acc": grade.score, "feedback": grade.feedback or ""}
