"""Group-relative advantages against verl's definition, as a loop."""

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


def by_loop(scores: Sequence[float], groups: Sequence[int], norm_by_std: bool) -> list[float]:
    """(score - mean) / (sample deviation + 1e-6) over the group's finite scores; 0 alone in the group or not finite."""
    result = []
    for score, group in zip(scores, groups, strict=True):
        members = [s for s, g in zip(scores, groups, strict=True) if g == group and math.isfinite(s)]
        if not math.isfinite(score) or len(members) < 2:
            result.append(0.0)
            continue
        centred = score - statistics.fmean(members)
        result.append(centred / (statistics.stdev(members) + 1e-6) if norm_by_std else centred)
    return result


def ours(scores: Sequence[float], groups: Sequence[int], norm_by_std: bool) -> list[float]:
    tensor = torch.tensor(scores, dtype=torch.float64)
    return compute_group_advantages(tensor, torch.tensor(groups), norm_by_std=norm_by_std).tolist()


def test_by_hand() -> None:
    # Group 4: mean 1/2, deviation sqrt((4 * 1/4) / 3) = sqrt(1/3); group 9: 3 and 5, mean 4, deviation sqrt 2.
    scores, groups = [1.0, 3.0, 0.0, 1.0, 5.0, 0.0], [4, 9, 4, 4, 9, 4]
    assert ours(scores, groups, False) == pytest.approx([0.5, -1.0, -0.5, 0.5, 1.0, -0.5], abs=1e-15)
    a, b = 0.5 / (math.sqrt(1 / 3) + 1e-6), 1 / (math.sqrt(2) + 1e-6)
    assert ours(scores, groups, True) == pytest.approx([a, -b, -a, a, b, -a], abs=1e-14)
    assert ours(scores, groups, True) == pytest.approx(by_loop(scores, groups, True), abs=1e-14)


@pytest.mark.parametrize("norm_by_std", [True, False])
def test_cases_at_the_edge(norm_by_std: bool) -> None:
    assert ours([], [], norm_by_std) == []
    # Alone in the group: nothing to compare with (verl keeps the raw score).
    assert ours([7.0], [0], norm_by_std) == [0.0]
    assert ours([2.0, 2.0, 2.0], [1, 1, 1], norm_by_std) == [0.0, 0.0, 0.0]
    # Not finite: 0, and as if it were not there for the rest; all alike, or one left, is 0 too.
    for bad in (NAN, INF, -INF):
        assert ours([bad, bad], [0, 0], norm_by_std) == [0.0, 0.0]
        assert ours([bad, 3.0], [0, 0], norm_by_std) == [0.0, 0.0]
        rest = ours([1.0, 4.0, 1.0], [0, 0, 0], norm_by_std)
        assert ours([1.0, bad, 4.0, 1.0], [0, 0, 0, 0], norm_by_std) == pytest.approx([rest[0], 0.0, *rest[1:]])
        assert ours([bad, 1.0, 4.0], [1, 0, 0], norm_by_std) == ours([8.0, 1.0, 4.0], [1, 0, 0], norm_by_std)


@PROPERTY
@given(
    rows=st.lists(
        st.tuples(st.floats(-5, 5) | st.sampled_from([NAN, INF, -INF, 0.0, 1.0]), st.integers(-2, 3)),
        min_size=1,
        max_size=12,
    ),
    norm_by_std=st.booleans(),
)
def test_any_scores_in_any_order_of_groups(rows: list[tuple[float, int]], norm_by_std: bool) -> None:
    scores, groups = zip(*rows, strict=True)
    # A deviation near 1e-6 divides rounding by rounding: bounded, but not comparable digit by digit.
    result = ours(scores, groups, norm_by_std)
    assert result == pytest.approx(by_loop(scores, groups, norm_by_std), abs=1e-7)
    for group in set(groups):
        assert sum(a for a, g in zip(result, groups, strict=True) if g == group) == pytest.approx(0.0, abs=1e-7)


def test_float32_and_whole_numbers() -> None:
    scores, groups = [1, 0, 0, 3], [5, 5, 2, 2]
    for norm_by_std in (True, False):
        expected = by_loop(scores, groups, norm_by_std)
        for kind in (torch.float32, torch.int64):
            tensor = torch.tensor(scores, dtype=kind)
            result = compute_group_advantages(tensor, torch.tensor(groups), norm_by_std=norm_by_std)
            assert result.dtype == torch.float32
            assert result.tolist() == pytest.approx(expected, rel=1e-6)


def test_scores_are_left_as_they_are() -> None:
    scores = torch.tensor([1.0, NAN, 3.0])
    compute_group_advantages(scores, torch.tensor([0, 0, 0]))
    assert scores[0] == 1.0
    assert math.isnan(scores[1])
