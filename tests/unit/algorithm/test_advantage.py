"""Group-relative advantages compared with verl's definition, written as a loop."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdpo.algorithm.advantage import compute_group_advantages

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
NAN, INF = math.nan, math.inf


def reference(scores: Sequence[float], groups: Sequence[int], norm_by_std: bool) -> list[float]:
    """(score - mean) / (deviation + 1e-6) over the group's finite scores; 0 for non-finite and for single scores."""
    result = []
    for score, group in zip(scores, groups, strict=True):
        members = [s for s, g in zip(scores, groups, strict=True) if g == group and math.isfinite(s)]
        if not math.isfinite(score) or len(members) < 2:
            result.append(0.0)
            continue
        centred = score - statistics.fmean(members)
        result.append(centred / (statistics.stdev(members) + 1e-6) if norm_by_std else centred)
    return result


def compute(scores: Sequence[float], groups: Sequence[int], norm_by_std: bool) -> list[float]:
    tensor = torch.tensor(scores, dtype=torch.float64)
    index = torch.tensor(groups, dtype=torch.long)
    return compute_group_advantages(tensor, index, norm_by_std=norm_by_std).tolist()


def test_advantages_of_two_groups() -> None:
    # Group 4: mean 1/2, deviation sqrt((4 * 1/4) / 3) = sqrt(1/3); group 9: 3 and 5, mean 4, deviation sqrt 2.
    scores, groups = [1.0, 3.0, 0.0, 1.0, 5.0, 0.0], [4, 9, 4, 4, 9, 4]
    assert compute(scores, groups, False) == pytest.approx([0.5, -1.0, -0.5, 0.5, 1.0, -0.5], abs=1e-15)
    a, b = 0.5 / (math.sqrt(1 / 3) + 1e-6), 1 / (math.sqrt(2) + 1e-6)
    assert compute(scores, groups, True) == pytest.approx([a, -b, -a, a, b, -a], abs=1e-14)
    assert compute(scores, groups, True) == pytest.approx(reference(scores, groups, True), abs=1e-14)


@pytest.mark.parametrize("norm_by_std", [True, False])
def test_single_equal_and_nonfinite_scores(norm_by_std: bool) -> None:
    assert compute([], [], norm_by_std) == []
    # A single rollout has advantage 0; verl keeps the raw score.
    assert compute([7.0], [0], norm_by_std) == [0.0]
    assert compute([2.0, 2.0, 2.0], [1, 1, 1], norm_by_std) == [0.0, 0.0, 0.0]
    # A non-finite score has advantage 0 and does not affect the group. One finite score, or none, gives 0 too.
    for nonfinite in (NAN, INF, -INF):
        assert compute([nonfinite, nonfinite], [0, 0], norm_by_std) == [0.0, 0.0]
        assert compute([nonfinite, 3.0], [0, 0], norm_by_std) == [0.0, 0.0]
        rest = compute([1.0, 4.0, 1.0], [0, 0, 0], norm_by_std)
        assert compute([1.0, nonfinite, 4.0, 1.0], [0, 0, 0, 0], norm_by_std) == pytest.approx(
            [rest[0], 0.0, *rest[1:]]
        )
        assert compute([nonfinite, 1.0, 4.0], [1, 0, 0], norm_by_std) == compute(
            [8.0, 1.0, 4.0], [1, 0, 0], norm_by_std
        )


@PROPERTY
@given(
    rows=st.lists(
        st.tuples(st.floats(-5, 5) | st.sampled_from([NAN, INF, -INF, 0.0, 1.0]), st.integers(-2, 3)),
        min_size=1,
        max_size=12,
    ),
    norm_by_std=st.booleans(),
)
def test_advantages_of_random_scores_and_groups(rows: list[tuple[float, int]], norm_by_std: bool) -> None:
    scores, groups = zip(*rows, strict=True)
    # With a deviation near 1e-6 both results are ratios of rounding errors: bounded, but not equal in all digits.
    result = compute(scores, groups, norm_by_std)
    assert result == pytest.approx(reference(scores, groups, norm_by_std), abs=1e-7)
    for group in set(groups):
        assert sum(a for a, g in zip(result, groups, strict=True) if g == group) == pytest.approx(0.0, abs=1e-7)


def test_float32_and_integer_scores() -> None:
    scores, groups = [1, 0, 0, 3], [5, 5, 2, 2]
    for norm_by_std in (True, False):
        expected = reference(scores, groups, norm_by_std)
        for dtype in (torch.float32, torch.int64):
            tensor = torch.tensor(scores, dtype=dtype)
            result = compute_group_advantages(tensor, torch.tensor(groups), norm_by_std=norm_by_std)
            assert result.dtype == torch.float32
            assert result.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("score", "count"), [(0.7, 7), (66.7, 16), (0.1, 3), (1e-30, 5), (3.3e37, 6)])
def test_equal_scores_have_exactly_no_advantage(score: float, count: int, dtype: torch.dtype) -> None:
    """Their deviation in float32 is a rounding error, which the formula makes 0.056 and 0.86 in the first two cases."""
    for norm_by_std in (True, False):
        scores, groups = torch.full((count,), score, dtype=dtype), torch.zeros(count, dtype=torch.long)
        assert compute_group_advantages(scores, groups, norm_by_std=norm_by_std).tolist() == [0.0] * count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_and_small_scores_do_not_overflow(dtype: torch.dtype) -> None:
    for largest in (1e20, 1e36, 1e200 if dtype == torch.float64 else 3e38):
        scores = torch.tensor([largest, 0, 0, 0], dtype=dtype)
        advantages = compute_group_advantages(scores, torch.zeros(4, dtype=torch.long))
        assert advantages.tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-6)
    # With a deviation far below epsilon, the advantage is the difference to the mean, divided by epsilon.
    tiny = compute_group_advantages(torch.tensor([1e-20, 0.0], dtype=dtype), torch.zeros(2, dtype=torch.long))
    assert tiny.tolist() == pytest.approx([5e-15, -5e-15], rel=1e-6)


def test_scores_are_not_modified() -> None:
    scores = torch.tensor([1.0, NAN, 3.0])
    compute_group_advantages(scores, torch.tensor([0, 0, 0]))
    assert scores[0] == 1.0
    assert math.isnan(scores[1])
