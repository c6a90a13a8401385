"""Scoring in a separate process: the same scores, and an end to every kind of hang."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sdpo.errors import SDPOError
from sdpo.rewards import scoring_process
from sdpo.rewards.base import RewardOutput, Row
from sdpo.rewards.scoring import RewardFailure
from sdpo.rewards.scoring_process import ScoringProcess

ROW = Row("sums", [], {"ground_truth": "4"}, extra_info={"index": 3})
SECONDS = 0.5
BODY = """
import os, re, time
from sdpo.errors import SDPOError

def compute_score(row, response):
    print("a reward function may print")
    if response == "raise":
        return 1 / 0
    if response == "leave":
        raise SystemExit(3)
    if response == "die":
        os._exit(3)
    if response == "sleep":
        time.sleep(600)
    if response == "loop":
        while True:
            try:
                time.sleep(600)
            except BaseException:
                pass
    if response == "lock":  # a call of C code that holds the interpreter's lock for minutes
        return sum(range(10**12))
    if response == "refuse":
        raise SDPOError("data.task: no such language")
    if response == "none":
        return None
    return {"score": float(response == row.ground_truth), "feedback": f"{row.data_source} {row.extra_info['index']}"}
"""

Make = Callable[..., ScoringProcess]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made = list[ScoringProcess]()

    def start(body: str = BODY, args: str = "{}") -> ScoringProcess:
        file = tmp_path / "task.py"
        file.write_text(body)
        made.append(ScoringProcess(str(file), args, SECONDS))
        return made[-1]

    yield start
    for each in made:
        each.close()


def test_score_equals_that_of_the_task(make: Make) -> None:
    scorer = make()
    assert scorer.compute_score(ROW, "4") == RewardOutput(1.0, "sums 3")
    assert scorer.compute_score(ROW, "5") == RewardOutput(0.0, "sums 3")


def test_arguments_reach_the_task(make: Make) -> None:
    body = "class build_task:\n    def __init__(self, value): self.value = value\n"
    scorer = make(body + "    def compute_score(self, row, response): return self.value", json.dumps({"value": 0.25}))
    assert scorer.compute_score(ROW, "") == RewardOutput(0.25)


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("raise", r"sums: ZeroDivisionError: division by zero \(.*task\.py:8\)"),
        ("leave", r"sums: SystemExit: 3 "),
        ("none", r"sums: InvalidRewardError: the score must be a finite number, got None"),
        ("sleep", r"sums: no score within reward\.timeout_s=0\.5 seconds \(.*task\.py:14\)"),
        ("loop", r"sums: no score within reward\.timeout_s=0\.5 seconds, or its process died"),
        ("lock", r"sums: no score within reward\.timeout_s=0\.5 seconds"),
        ("die", r"sums: no score within .*, or its process died"),
    ],
)
def test_failure_affects_one_response(make: Make, monkeypatch: pytest.MonkeyPatch, response: str, reason: str) -> None:
    scorer = make()
    scorer.compute_score(ROW, "4")  # so that the next call does not include the start of the process
    began = time.monotonic()
    with pytest.raises(RewardFailure, match=reason):
        scorer.compute_score(ROW, response)
    assert time.monotonic() - began < SECONDS + 2 * scoring_process.GRACE_SECONDS + 1
    assert scorer.compute_score(ROW, "4") == RewardOutput(1.0, "sums 3")


def test_user_error_of_the_task_is_not_counted_as_a_failure(make: Make) -> None:
    scorer = make()
    with pytest.raises(SDPOError, match=r"^data\.task: no such language$"):
        scorer.compute_score(ROW, "refuse")


def test_task_that_cannot_be_loaded_is_refused(make: Make) -> None:
    scorer = make("x = 1")
    for _ in range(2):
        with pytest.raises(SDPOError, match="defines neither compute_score"):
            scorer.compute_score(ROW, "4")


def test_each_thread_gets_its_scores(make: Make) -> None:
    scorer = make()
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(lambda i: scorer.compute_score(ROW, str(i % 5)).score, range(50)))
    assert outputs == [float(i % 5 == 4) for i in range(50)]


def test_process_ends_with_its_owner(make: Make) -> None:
    """The parent cannot end a hanging call that no timer interrupts after the parent was killed."""
    scorer = make()
    scorer.compute_score(ROW, "4")
    process = scorer._worker._process
    assert process is not None and process.stdin is not None
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(scorer.compute_score, ROW, "lock")
        end = time.monotonic() + SECONDS + 2 * scoring_process.GRACE_SECONDS + 5
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        with pytest.raises(RewardFailure):
            asked.result()
    assert process.returncode == 1  # it exited; killed by the parent it would be -9
    assert os.getpid() != process.pid
