from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.prompting.demonstrations import PrivilegedContext, ScoredRollout, compute_success_rates, select_demonstrations


def select(samples: list[ScoredRollout], seed: int = 0, **changes: Any) -> list[PrivilegedContext]:
    return select_demonstrations(samples, SelfDistillationConfig(**changes), random.Random(seed))


def solutions(samples: list[ScoredRollout], seed: int = 0, **changes: Any) -> list[str | None]:
    return [demonstration.solution for demonstration in select(samples, seed, **changes)]


def rollouts(*scores: float, group_id: int = 0, **known: Any) -> list[ScoredRollout]:
    return [ScoredRollout(group_id, f"{group_id}:{i}", score, **known) for i, score in enumerate(scores)]


def test_blank_ground_truth_is_no_demonstration() -> None:
    samples = [
        ScoredRollout(1, "r", 0.0, ground_truth="4"),
        ScoredRollout(1, "r", 1.0, ground_truth="5"),
        ScoredRollout(2, "r", 0.0, ground_truth=" \n"),
        ScoredRollout(2, "r", 0.0),
    ]
    assert solutions(samples, demonstration_source="ground_truth") == ["4", "5", None, None]


def test_demonstration_is_a_successful_rollout_of_the_group() -> None:
    samples = [
        *rollouts(0.0, 1.0, 0.5, group_id=1, ground_truth="4"),
        *rollouts(0.0, 0.0, group_id=2, ground_truth="5"),
    ]
    # groups of a batch may be interleaved
    samples = [samples[i] for i in (3, 0, 1, 4, 2)]
    assert solutions(samples, demonstration_source="successful_rollout") == [None, "1:1", None, None, "1:1"]
    assert solutions(samples, demonstration_source="successful_rollout_then_ground_truth") == [
        "5",
        "1:1",
        "4",
        "5",
        "1:1",
    ]


def test_success_is_at_least_the_threshold() -> None:
    samples = rollouts(0.5, 0.4999, 0.0)
    assert solutions(samples, demonstration_source="successful_rollout", success_reward_threshold=0.5) == [
        None,
        "0:0",
        "0:0",
    ]
    assert solutions(samples, demonstration_source="successful_rollout", success_reward_threshold=1.0) == [None] * 3


@pytest.mark.parametrize("source", ["successful_rollout", "ground_truth", "successful_rollout_then_ground_truth"])
@pytest.mark.parametrize("threshold", [1.0, -1e9])
@pytest.mark.parametrize("only_failed", [False, True])
def test_unscored_response_has_no_context_and_is_no_demonstration(
    source: Any, threshold: float, only_failed: bool
) -> None:
    settings = {"demonstration_source": source, "distill_only_failed": only_failed}
    samples = [replace(s, feedback="Wrong.") for s in rollouts(math.nan, 1.0, math.nan, 0.0, ground_truth="4")]
    shown = select(samples, success_reward_threshold=threshold, include_environment_feedback=True, **settings)
    assert [shown[0], shown[2]] == [PrivilegedContext()] * 2
    assert not {"0:0", "0:2"} & {demonstration.solution for demonstration in shown}


@settings(max_examples=100, deadline=None)
@given(
    scores=st.lists(st.sampled_from([0.0, 1.0, math.nan]), max_size=12),
    groups=st.lists(st.integers(0, 2), min_size=12, max_size=12),
    seed=st.integers(0, 1000),
    exclude=st.booleans(),
)
def test_demonstration_is_another_successful_rollout(
    scores: list[float], groups: list[int], seed: int, exclude: bool
) -> None:
    samples = [
        ScoredRollout(group, f"{i}", score) for i, (score, group) in enumerate(zip(scores, groups, strict=False))
    ]
    chosen = solutions(samples, seed, demonstration_source="successful_rollout", dont_reprompt_on_self_success=exclude)
    for i, (sample, solution) in enumerate(zip(samples, chosen, strict=True)):
        allowed = {
            peer.response
            for j, peer in enumerate(samples)
            if peer.group_id == sample.group_id and peer.score == 1.0 and not (exclude and j == i)
        }
        assert (solution in allowed) if allowed and sample.is_scored else (solution is None)


def test_rollout_is_its_own_demonstration_only_if_allowed() -> None:
    samples = rollouts(1.0, 0.0)
    assert solutions(samples, demonstration_source="successful_rollout") == [None, "0:0"]
    assert solutions(samples, demonstration_source="successful_rollout", dont_reprompt_on_self_success=False) == [
        "0:0",
        "0:0",
    ]


def test_demonstrations_are_sampled_uniformly() -> None:
    samples = rollouts(1.0, 0.0, 1.0, 1.0, 1.0, 1.0)
    draws, rng = 4000, random.Random(7)
    config = SelfDistillationConfig(demonstration_source="successful_rollout")
    counts: list[Counter[str | None]] = [Counter() for _ in samples]
    for _ in range(draws):
        for count, demonstration in zip(counts, select_demonstrations(samples, config, rng), strict=True):
            count[demonstration.solution] += 1
    successes = {"0:0", "0:2", "0:3", "0:4", "0:5"}
    for sample, count in zip(samples, counts, strict=True):
        expected = successes - {sample.response}
        assert set(count) == expected
        chi_square = sum((count[peer] - draws / len(expected)) ** 2 / (draws / len(expected)) for peer in expected)
        assert chi_square < 18.5  # 0.1% of uniform draws exceed it, with 4 degrees of freedom


def test_selection_is_reproducible() -> None:
    samples = rollouts(*[1.0] * 16)
    first = solutions(samples, seed=3, demonstration_source="successful_rollout")
    assert first == solutions(samples, seed=3, demonstration_source="successful_rollout")
    assert first != solutions(samples, seed=4, demonstration_source="successful_rollout")


def test_only_failed_samples_are_distilled() -> None:
    samples = rollouts(1.0, 0.0, 1.0, ground_truth="4", feedback="wrong")
    chosen = select(
        samples,
        demonstration_source="ground_truth",
        environment_feedback_only_without_solution=False,
        distill_only_failed=True,
    )
    assert chosen == [PrivilegedContext(), PrivilegedContext("4", "wrong"), PrivilegedContext()]
    assert [d.is_empty for d in chosen] == [True, False, True]
    # a success is still shown to the failed
    peers = solutions(rollouts(1.0, 0.0), demonstration_source="successful_rollout", distill_only_failed=True)
    assert peers == [None, "0:0"]


def test_feedback() -> None:
    samples = [
        ScoredRollout(0, "r", 0.0, feedback="too high", ground_truth="4"),
        ScoredRollout(0, "r", 0.0, feedback=" \n", ground_truth="4"),
        ScoredRollout(0, "r", 0.0, feedback="too low"),
        ScoredRollout(0, "r", 0.0),
    ]
    assert [d.feedback for d in select(samples, include_environment_feedback=False)] == [None] * 4
    assert [d.feedback for d in select(samples)] == [None, None, "too low", None], "the official defaults"
    both = {"environment_feedback_only_without_solution": False}
    assert [d.feedback for d in select(samples, **both)] == ["too high", None, "too low", None]
    assert select(samples, demonstration_source="none")[0] == PrivilegedContext(None, "too high")


def test_reasoning_is_removed_from_solutions_and_not_from_feedback() -> None:
    samples = [
        ScoredRollout(0, "<think>a</think>peer", 1.0),
        ScoredRollout(0, "r", 0.0, feedback="<think>f</think>", ground_truth="b</think>truth"),
    ]
    options = {"environment_feedback_only_without_solution": False}
    shown = select(samples, demonstration_source="successful_rollout", **options)[1]
    assert shown == PrivilegedContext("peer", "<think>f</think>", is_from_peer=True)
    assert solutions(samples)[1] == "truth"
    kept = {"remove_thinking_from_demonstration": False}
    assert solutions(samples, demonstration_source="successful_rollout", **kept)[1] == "<think>a</think>peer"
    assert solutions(samples, **kept)[1] == "b</think>truth"


def test_solution_without_text_after_the_reasoning_is_none() -> None:
    samples = [
        ScoredRollout(0, "<think>cut off", 1.0),
        ScoredRollout(0, " ", 1.0),
        ScoredRollout(0, "answer", 1.0),
        ScoredRollout(0, "r", 0.0, feedback="wrong", ground_truth="<think>x</think>"),
    ]
    for seed in range(20):
        assert solutions(samples, seed, demonstration_source="successful_rollout") == [
            "answer",
            "answer",
            None,
            "answer",
        ]
    assert solutions(samples, demonstration_source="ground_truth") == [None] * 4
    # feedback steps in where the removal leaves no solution
    alone = select(samples, include_environment_feedback=True, environment_feedback_only_without_solution=True)
    assert alone[3] == PrivilegedContext(None, "wrong")


def test_success_rates() -> None:
    samples = [
        *rollouts(1.0, 0.0, math.nan, 0.5, group_id=1),
        *rollouts(0.2, group_id=2),
        *rollouts(1.0, group_id=3),
    ]
    assert compute_success_rates(samples, 1.0) == [1 / 3] * 4 + [0.0, 1.0]
    assert compute_success_rates(samples, 0.5) == [2 / 3] * 4 + [0.0, 1.0]
    assert compute_success_rates(samples, -math.inf) == [1.0] * 6
    assert compute_success_rates(rollouts(math.nan), 0.0) == [0.0]
    assert compute_success_rates([], 1.0) == []


@pytest.mark.parametrize(
    ("demonstration", "empty"),
    [
        (PrivilegedContext(), True),
        (PrivilegedContext(" ", "\n"), True),
        (PrivilegedContext("a"), False),
        (PrivilegedContext(None, "a"), False),
    ],
)
def test_is_empty(demonstration: PrivilegedContext, empty: bool) -> None:
    assert demonstration.is_empty is empty


SETTINGS: dict[str, Any] = {
    "demonstration_source": "ground_truth",
    "success_reward_threshold": 0.3,
    "dont_reprompt_on_self_success": False,
    "distill_only_failed": True,
    "include_environment_feedback": False,
    "environment_feedback_only_without_solution": False,
    "remove_thinking_from_demonstration": False,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_changes_the_context(name: str) -> None:
    samples = [
        ScoredRollout(0, "<think>a</think>best", 1.0, feedback="right", ground_truth="4"),
        ScoredRollout(0, "fair", 0.5, feedback="nearly", ground_truth="4"),
        ScoredRollout(0, "poor", 0.0, feedback="wrong", ground_truth="4"),
    ]
    base = SelfDistillationConfig(demonstration_source="successful_rollout", include_environment_feedback=True)
    changed = replace(base, **{name: SETTINGS[name]})
    assert select_demonstrations(samples, base, random.Random(0)) != select_demonstrations(
        samples, changed, random.Random(0)
    )
