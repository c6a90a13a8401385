"""Reward functions that are coroutine functions: concurrent and within the timeout, in both backends."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdpo.config.data import RewardConfig
from sdpo.errors import SDPOError
from sdpo.rewards import async_scoring
from sdpo.rewards.async_scoring import AsyncScorer, is_asynchronous
from sdpo.rewards.base import RewardOutput, Row, load_task
from sdpo.rewards.manager import RewardManager
from sdpo.rewards.scoring import RewardFailure

ROW = Row("sums", [], {"ground_truth": "4"})
SECONDS = 0.4


async def compute_score(row: Row, response: str) -> Any:
    if response == "raise":
        return 1 / 0
    if response == "leave":
        raise SystemExit(3)
    if response == "cancel":
        raise asyncio.CancelledError
    if response == "hang":
        await asyncio.sleep(600)
    if response == "cling":  # does not let itself be cancelled
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(600)
    if response == "block":
        time.sleep(3)
    if response == "refuse":
        raise SDPOError("data.task: no such language")
    if response == "none":
        return None
    await asyncio.sleep(0.1)
    return {"score": float(response == row.ground_truth), "feedback": f"not {response}"}


@pytest.fixture
def scorer(monkeypatch: pytest.MonkeyPatch) -> AsyncScorer:
    monkeypatch.setattr(async_scoring, "GRACE_SECONDS", 0.2)
    return AsyncScorer(SimpleNamespace(compute_score=compute_score), SECONDS)


def test_detection_of_coroutine_functions() -> None:
    assert is_asynchronous(SimpleNamespace(compute_score=compute_score))
    assert not is_asynchronous(SimpleNamespace(compute_score=lambda row, response: 1.0))


def test_responses_are_awaited_concurrently(scorer: AsyncScorer) -> None:
    began = time.monotonic()
    with ThreadPoolExecutor(30) as pool:  # as verl calls it
        outputs = list(pool.map(lambda number: scorer.compute_score(ROW, str(number)), range(30)))
    assert outputs == [RewardOutput(float(number == 4), f"not {number}") for number in range(30)]
    assert time.monotonic() - began < 30 * 0.1 / 3


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ("raise", r"sums: ZeroDivisionError: division by zero \(.*test_async_scoring.py:\d+\)"),
        ("leave", r"sums: SystemExit: 3"),
        ("cancel", r"sums: CancelledError"),
        ("hang", f"sums: no score within reward.timeout_s={SECONDS} seconds"),
        ("cling", f"sums: no score within reward.timeout_s={SECONDS} seconds"),
        ("block", f"sums: no score within reward.timeout_s={SECONDS} seconds, and it blocks the event loop"),
        ("none", "sums: InvalidRewardError: the score must be a finite number, got None"),
    ],
)
def test_failure_affects_one_response(response: str, message: str, scorer: AsyncScorer) -> None:
    began = time.monotonic()
    with pytest.raises(RewardFailure, match=message):
        scorer.compute_score(ROW, response)
    assert time.monotonic() - began < SECONDS + 0.2 + 1.0
    assert scorer.compute_score(ROW, "4") == RewardOutput(1.0, "not 4")


def test_task_may_refuse_its_data(scorer: AsyncScorer) -> None:
    with pytest.raises(SDPOError, match="no such language"):
        scorer.compute_score(ROW, "refuse")


def test_reward_manager_awaits_a_step_concurrently_and_counts_failures() -> None:
    config = RewardConfig(timeout_s=SECONDS, max_failure_fraction=0.2)
    ours = RewardManager(SimpleNamespace(compute_score=compute_score), config)
    began = time.monotonic()
    outputs = ours.compute_score([(ROW, response) for response in ["raise", "4", "hang", *map(str, range(5, 17))]])
    assert time.monotonic() - began < SECONDS + 0.5  # 1.7 seconds in sequence
    assert [output.score for output in outputs[3:]] == [0.0] * 12 and outputs[1].score == 1.0
    assert math.isnan(outputs[0].score) and math.isnan(outputs[2].score) and ours.num_failures == 2
    with pytest.raises(SDPOError, match=r"scoring failed for 2 of the 2 responses .* ZeroDivisionError"):
        ours.compute_score([(ROW, "raise")] * 5)


def test_reward_function_of_verl_awaits_the_coroutine(tmp_path: Path) -> None:
    reward = pytest.importorskip("sdpo.verl_backend.rollout.reward")
    task = tmp_path / "task.py"
    task.write_text(
        "import asyncio\n\nasync def compute_score(row, response):\n    await asyncio.sleep(0.01)\n"
        "    return {'score': float(response == row.ground_truth), 'feedback': row.extra_info['hint']}\n"
    )
    assert is_asynchronous(load_task(str(task), {}))
    made: Callable[..., dict[str, Any]] = reward.compute_score
    settings: dict[str, Any] = {"task": str(task), "timeout_s": SECONDS}
    right = made("sums", "4", "4", {"hint": "add"}, **settings)
    assert right == {"score": 1.0, "acc": 1.0, "feedback": "add"}
    with pytest.raises(RewardFailure, match="KeyError: 'hint'"):
        made("sums", "4", "4", {}, **settings)
