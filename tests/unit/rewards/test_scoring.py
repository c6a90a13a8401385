"""Reward functions that raise, hang or return nonsense: effect, message, and when the run is aborted."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from sdpo.config.data import RewardConfig
from sdpo.errors import SDPOError
from sdpo.rewards.base import RewardOutput, Row, load_task
from sdpo.rewards.geo3k.reward import Geo3k
from sdpo.rewards.manager import RewardManager

ROW = Row("sums", [{"role": "user", "content": "1 + 1?"}], {"ground_truth": "2"}, origin="data.train_files: a: row 7")


@pytest.fixture
def make_manager(tmp_path: Path) -> Callable[..., RewardManager]:
    """A reward manager of a task file with this function body."""

    def make(body: str, **settings: Any) -> RewardManager:
        name = tmp_path / "mine.py"
        name.write_text(f"def compute_score(row, response):\n    {body}\n")
        config = RewardConfig(**{"max_failure_fraction": 1.0, **settings})
        return RewardManager(load_task(str(name), {}), config)

    return make


@pytest.fixture(autouse=True)
def _signals_are_restored() -> Iterator[None]:
    before = signal.getsignal(signal.SIGALRM)
    yield
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def scores(reward_manager: RewardManager, *responses: str) -> list[float | None]:
    outputs = reward_manager.compute_score([(ROW, response) for response in responses])
    return [output.score if output.score == output.score else None for output in outputs]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return 1 / len(response)", "ZeroDivisionError: division by zero ({file}:2)"),
        (
            "return {'': None}.get(response, 1)",
            "InvalidRewardError: the score must be a finite number, got None ({file}:1)",
        ),
        (
            "return float(response or 'nan')",
            "InvalidRewardError: the score must be a finite number, got nan ({file}:1)",
        ),
        (
            "return float(response or '-inf')",
            "InvalidRewardError: the score must be a finite number, got -inf ({file}:1)",
        ),
        (
            "return 1 if response else 10**999",
            "InvalidRewardError: the score must be a finite number, got 1" + "0" * 79 + " ({file}:1)",
        ),
        (
            "return 1 if response else {'score': 1, 'feedback': 3}",
            "InvalidRewardError: the feedback must be text, got 3 ({file}:1)",
        ),
        ("return 1 if response else exit(3)", "SystemExit: 3 ({file}:2)"),
        ("return 1 if response else compute_score(row, response)", None),
        ("return 1 if response else [][0]", "IndexError: list index out of range ({file}:2)"),
        ("return 1 if response else __import__('json').loads('{{')", None),
    ],
)
def test_failure_affects_one_response(
    body: str,
    reason: str | None,
    make_manager: Callable[..., RewardManager],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    reward_manager = make_manager(body)
    assert scores(reward_manager, "1", "", "1", "", "1") == [1.0, None, 1.0, None, 1.0]
    assert reward_manager.num_failures == 2
    [message] = caplog.messages  # one message per kind
    assert "\n" not in message and "data.train_files: a: row 7: " in message
    if reason is not None:
        assert message.endswith(reason.replace("{file}", str(tmp_path / "mine.py")))


def test_each_kind_of_failure_is_reported_once(
    make_manager: Callable[..., RewardManager], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    reward_manager = make_manager("if not response: raise ValueError('two\\nlines')\n    raise TypeError")
    assert scores(reward_manager, "", "1", "", "1", "") == [None] * 5
    assert [message.split("row 7: ")[1] for message in caplog.messages] == [
        f"ValueError: two lines ({tmp_path}/mine.py:2)",
        f"TypeError ({tmp_path}/mine.py:3)",
    ]


def test_run_stops_above_the_failure_limit(make_manager: Callable[..., RewardManager], tmp_path: Path) -> None:
    reward_manager = make_manager("return 1 / len(response)", max_failure_fraction=0.25)
    assert scores(reward_manager, *["", "", *"123456"]) == [None, None, *[1.0] * 6]
    with pytest.raises(SDPOError) as caught:
        scores(reward_manager, *["", "1", "", "", *"1234"])
    assert str(caught.value) == (
        f"data.task: scoring failed for 3 of the 4 responses scored so far, of 8 in all, which is "
        "more than reward.max_failure_fraction=0.25; the last: data.train_files: a: row 7: ZeroDivisionError: division "
        f"by zero ({tmp_path}/mine.py:2)"
    )
    with pytest.raises(SDPOError, match="failed for 1 of the 1 responses scored so far, of 100 in all"):
        scores(make_manager("return 1 / 0", max_failure_fraction=0.0), *["1"] * 100)


def test_user_error_of_the_task_stops_the_run() -> None:
    reward_manager = RewardManager(Geo3k(), RewardConfig(max_failure_fraction=1.0))
    with pytest.raises(SDPOError, match=r"row \? of sums has no reward_model\.ground_truth"):
        reward_manager.compute_score([(Row("sums", [], {}), "2")])


@pytest.mark.parametrize(
    "hang",
    [
        "__import__('time').sleep(60)",
        "sum(iter(lambda: 1, 2))",
        "__import__('threading').Event().wait()",
        "__import__('re').match('(a+)+$', 'a' * 40 + 'b')",
    ],
)
def test_hanging_call_times_out(
    hang: str, make_manager: Callable[..., RewardManager], caplog: pytest.LogCaptureFixture
) -> None:
    reward_manager = make_manager(f"return {hang} if not response else 1", timeout_s=0.2)
    began = time.monotonic()
    assert scores(reward_manager, "1", "", "1") == [1.0, None, 1.0]
    assert time.monotonic() - began < 5
    assert caplog.messages[0].endswith(
        "no score within reward.timeout_s=0.2 seconds (" + caplog.messages[0].split("(")[-1]
    )


def test_timeout_cannot_be_caught(make_manager: Callable[..., RewardManager]) -> None:
    swallow_all = "for _ in range(100):\n        try: __import__('time').sleep(0.1)\n        except Exception: pass"
    began = time.monotonic()
    assert scores(make_manager(swallow_all, timeout_s=0.2), "") == [None]
    once = "try: __import__('time').sleep(60)\n    except BaseException: __import__('time').sleep(60)"
    assert scores(make_manager(once, timeout_s=0.2), "") == [None]
    assert time.monotonic() - began < 8


def test_no_timeout_outside_of_the_main_thread_or_if_disabled(make_manager: Callable[..., RewardManager]) -> None:
    slow = "__import__('time').sleep(0.3) or 1.0"
    assert scores(make_manager(f"return {slow}", timeout_s=None), "") == [1.0]
    results: list[Any] = []
    reward_manager = make_manager(f"return {slow}", timeout_s=0.1)
    thread = threading.Thread(target=lambda: results.extend(scores(reward_manager, "")))
    thread.start()
    thread.join()
    assert results == [1.0]


def test_earlier_timer_is_restored(make_manager: Callable[..., RewardManager]) -> None:
    rung: list[int] = []

    def ring(number: int, frame: FrameType | None) -> None:
        rung.append(number)

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.4)
    try:
        assert scores(make_manager("__import__('time').sleep(60)", timeout_s=0.1), "") == [None]
        assert signal.getsignal(signal.SIGALRM) is ring
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 0.35
        time.sleep(0.5)
        assert rung == [signal.SIGALRM]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_task_that_sets_the_timer() -> None:
    """math-verify in the main thread, as many reward functions call it: it sets and clears the same timer."""
    from math_verify import parse, verify

    class Own:
        def compute_score(self, row: Row, response: str) -> float:
            return float(verify(parse(row.ground_truth or ""), parse(response)))

    reward_manager = RewardManager(Own(), RewardConfig(timeout_s=10.0))
    assert scores(reward_manager, "2", "$\\frac{4}{2}$", "3") == [1.0, 1.0, 0.0]


def test_geo3k_is_scored_within_the_timeout() -> None:
    """Its process has a shorter limit: an endless expression is a wrong answer, not a failure."""
    reward_manager = RewardManager(Geo3k(format_weight=0.0, timeout=1.0), RewardConfig(max_failure_fraction=0.0))
    row = Row("geometry3k", [], {"ground_truth": "3 \\sqrt{2}"})
    texts = ["\\boxed{\\sqrt{18}}", "\\boxed{9^{9^{9^{9^9}}}}", "\\boxed{\\sqrt{18}}"]
    outputs = reward_manager.compute_score([(row, text) for text in texts])
    assert [output.score for output in outputs] == [1.0, 0.0, 1.0]
    assert all(isinstance(output, RewardOutput) for output in outputs)


def test_ctrl_c_is_not_counted_as_a_failure(make_manager: Callable[..., RewardManager]) -> None:
    with pytest.raises(KeyboardInterrupt):
        scores(make_manager("raise KeyboardInterrupt"), "")
