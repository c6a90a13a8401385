"""Each check fails at the step computed by hand, once per episode, and not on noise."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import pytest

from sdpo.config.monitoring import HealthConfig
from sdpo.observability import metrics
from sdpo.observability.health import HealthMonitor

RULES = [f.name for f in fields(HealthConfig) if f.type == "str"]
BRISK = HealthConfig(window=2, min_z_score=0.0)
SCORE, ENTROPY, LENGTH = metrics.SCORE_MEAN, metrics.ENTROPY, metrics.RESPONSE_LENGTH_MEAN
CLIPPED, DISTILLED, SUCCEEDED = (
    metrics.RESPONSE_LENGTH_CLIP_RATIO,
    metrics.REPROMPT_FRACTION,
    metrics.ROLLOUT_SUCCESS_FRACTION,
)
GAIN = metrics.teacher_gain_name("digits")
GAIN_HIGH = metrics.ci95_names(GAIN)[1]
Series = Mapping[str, Sequence[float | None]]


def rows_of(series: Series) -> list[dict[str, float]]:
    """One row per step; a shorter series continues with its last value, None omits a value."""
    length = max(map(len, series.values()))
    padded = {name: [*values, *[values[-1]] * (length - len(values))] for name, values in series.items()}
    return [{name: value for name, values in padded.items() if (value := values[i]) is not None} for i in range(length)]


def events_of(series: Series, config: HealthConfig = BRISK) -> list[tuple[int, str]]:
    monitor = HealthMonitor(config)
    return [(e.step, e.rule) for step, row in enumerate(rows_of(series), 1) for e in monitor.check(step, row)]


# Windows have two steps. Each comment has the means.
BY_HAND: dict[str, tuple[Series, list[tuple[int, str]]]] = {
    # Means of two: 1 1 1 1 0.9 0.8; 0.9 is not more than a tenth below 1.
    "score falls": ({SCORE: [1, 1, 1, 1, 1, 0.8, 0.8, 0.8, 0.8]}, [(7, "score_collapse")]),
    "score never falls": ({SCORE: [0.1, 0.2, 0.3, 0.4, 0.5, 0.9, 0.9]}, []),
    # Before the fourth step, first and last window overlap.
    "score falls at once": ({SCORE: [1, 0, 0, 0, 0]}, [(4, "score_collapse")]),
    "a score below zero falls": ({SCORE: [-1, -1, -1, -1, -1.5, -1.5]}, [(5, "score_collapse")]),
    # 1 1 0.525 0.05; below a tenth of 1 at the fifth.
    "entropy falls": ({ENTROPY: [1, 1, 1, 0.05, 0.05], SCORE: [0.3]}, [(5, "entropy_collapse")]),
    "entropy falls as the score rises": ({ENTROPY: [1, 1, 1, 0.05, 0.05], SCORE: [0.3, 0.3, 0.5, 0.9, 0.9]}, []),
    # 1 1 1 1.25 2.25
    "entropy rises": ({ENTROPY: [1, 1, 1, 1, 1.5, 3, 3]}, [(6, "entropy_explosion")]),
    # 1 1 1 1.25 2.25
    "teacher becomes unsure": ({metrics.TEACHER_ENTROPY: [1, 1, 1, 1, 1.5, 3, 3]}, [(6, "teacher_entropy_increase")]),
    # 10 10 7 4
    "length falls": ({LENGTH: [10, 10, 10, 4, 4], SCORE: [0.3]}, [(5, "length_collapse")]),
    "length falls as the score rises": ({LENGTH: [10, 10, 10, 4, 4], SCORE: [0.3, 0.3, 0.5, 0.9, 0.9]}, []),
    # 0 0 0.1 0.3
    "responses are cut off": ({CLIPPED: [0, 0, 0, 0.2, 0.4]}, [(5, "length_collapse")]),
    "teacher is worse": (
        {GAIN: [None, -0.1, None], GAIN_HIGH: [None, -0.03, None]},
        [(2, "teacher_underperforms_student")],
    ),
    "teacher may be as good": ({GAIN: [-0.1], GAIN_HIGH: [-0.01]}, []),
    # 0.5 0.25 0; the check would fail from the fourth step on if few rollouts succeeded.
    "nothing is distilled": ({DISTILLED: [0.5, 0.5, 0, 0, 0], SUCCEEDED: [0.3]}, [(4, "no_distillation_targets")]),
    "nothing is left to learn": ({DISTILLED: [0.5, 0.5, 0, 0, 0], SUCCEEDED: [0.3, 0.9, 1, 1, 1]}, []),
    "nothing is known": ({metrics.LOSS: [1.0] * 9}, []),
    "not finite": ({SCORE: [1, 1, 1, 1, float("nan"), float("inf"), 1, 1]}, []),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_each_check(name: str) -> None:
    series, expected = BY_HAND[name]
    assert events_of(series) == expected


def test_ignored_check_never_fails() -> None:
    for series, _ in BY_HAND.values():
        assert events_of(series, replace(BRISK, **dict.fromkeys(RULES, "ignore"))) == []


def test_event_has_the_values() -> None:
    monitor = HealthMonitor(replace(BRISK, score_collapse="stop"))
    events = [e for step, row in enumerate(rows_of(BY_HAND["score falls"][0]), 1) for e in monitor.check(step, row)]
    (event,) = events
    assert (event.step, event.action) == (7, "stop")
    assert event.reason == "training score fell from 1 to 0.8 (means of 2 steps)"
    assert event.values == pytest.approx({f"{SCORE}/before": 1.0, SCORE: 0.8})


def test_one_event_per_failure_and_another_after_recovery() -> None:
    # Fails at 7, passes at 8 (0.9) and 9 (1), which is a window, and fails again at 11.
    assert events_of({SCORE: [1, 1, 1, 1, 1, 0.8, 0.8, 1, 1, 0.8, 0.8, 0.8]}) == [
        (7, "score_collapse"),
        (11, "score_collapse"),
    ]
    # It passes at 8 alone: too short for a recovery.
    assert events_of({SCORE: [1, 1, 1, 1, 1, 0.8, 0.8, 1, 0.7, 0.7, 0.7]}) == [(7, "score_collapse")]


def test_teacher_is_judged_by_its_last_evaluation() -> None:
    gains = [-0.1, None, None, -0.1, None, 0.0, None, None, -0.1]
    highs = [-0.05, None, None, -0.05, None, 0.01, None, None, -0.05]
    assert events_of({GAIN: gains, GAIN_HIGH: highs}) == [
        (1, "teacher_underperforms_student"),
        (9, "teacher_underperforms_student"),
    ]


def test_change_within_the_noise_is_ignored() -> None:
    # Consecutive steps differ by 0.4, the last two by 0. Standard error of the difference between two means of two:
    # sqrt(11 / 12 * 0.4^2 / 2) = 0.27. The drop is 0.2.
    series = {SCORE: [1, 0.6] * 6 + [0.6]}
    assert events_of(series, replace(BRISK, min_z_score=0.8)) == []
    assert events_of(series, replace(BRISK, min_z_score=0.6)) == [(13, "score_collapse")]


@pytest.mark.parametrize("seed", range(20))
def test_no_check_fails_on_noise_alone(seed: int) -> None:
    rng = random.Random(seed)
    series = {
        SCORE: [rng.gauss(0.5, 0.12) for _ in range(500)],
        ENTROPY: [abs(rng.gauss(0.1, 0.03)) for _ in range(500)],
        LENGTH: [rng.gauss(100, 30) for _ in range(500)],
        CLIPPED: [rng.random() * 0.4 for _ in range(500)],
        DISTILLED: [rng.random() for _ in range(500)],
        SUCCEEDED: [rng.random() for _ in range(500)],
    }
    assert events_of(series, HealthConfig()) == []


@pytest.mark.parametrize("seed", range(5))
def test_significant_change_in_noise_is_detected(seed: int) -> None:
    rng = random.Random(seed)
    noisy = {
        SCORE: [rng.gauss(0.6, 0.05) for _ in range(100)] + [rng.gauss(0.3, 0.05) for _ in range(100)],
        ENTROPY: [rng.gauss(0.3, 0.03) for _ in range(100)] + [rng.gauss(0.9, 0.03) for _ in range(100)],
        LENGTH: [rng.gauss(100, 10) for _ in range(100)] + [rng.gauss(30, 10) for _ in range(100)],
    }
    found = events_of(noisy, HealthConfig())
    assert sorted(rule for _, rule in found) == ["entropy_explosion", "length_collapse", "score_collapse"]
    assert all(100 < step <= 110 for step, _ in found)


@pytest.mark.parametrize("name", [name for name, (_, expected) in BY_HAND.items() if expected])
def test_monitor_resumes_from_its_state(name: str) -> None:
    series, expected = BY_HAND[name]
    rows = rows_of(series)
    for resumed_after in range(len(rows)):
        monitor = HealthMonitor(BRISK)
        found: list[Any] = []
        for step, row in enumerate(rows, 1):
            found += [(e.step, e.rule) for e in monitor.check(step, row)]
            if step == resumed_after:
                state = json.loads(json.dumps(monitor.state_dict(), allow_nan=False))
                monitor = HealthMonitor(BRISK)
                monitor.load_state_dict(state)
        assert found == expected
        assert monitor.num_events == len(expected)
