"""Intervals by hand, and their coverage."""

from __future__ import annotations

import math
import random

import pytest

from sdpo.observability.confidence import ClusteredMean, compute_wilson_interval, name_interval


def test_mean_and_interval_of_two_clusters() -> None:
    # Mean 4. Residuals 4 - 2 * 4 = -4 and 12 - 2 * 4 = 4; sqrt(2 / 1 * 32) / 4 = 2.
    mean = ClusteredMean.of([1, 3, 5, 7], ["a", "a", "b", "b"])
    assert mean.mean == 4
    assert mean.normal_interval() == pytest.approx((4 - 1.96 * 2, 4 + 1.96 * 2), abs=1e-3)


def test_clusters_of_different_size() -> None:
    # Mean 4 / 4. Residuals 2 - 1 and 2 - 3; sqrt(2 / 1 * 2) / 4 = 0.5.
    mean = ClusteredMean()
    mean.add("a", 2, 1)
    mean.add("b", 1.5, 2)
    mean.add("b", 0.5, 1)
    mean.add("empty", 0, 0)
    assert (mean.mean, mean.num_clusters) == (1, 2)
    assert mean.normal_interval() == pytest.approx((1 - 1.96 * 0.5, 1 + 1.96 * 0.5), abs=1e-3)


def test_duplicates_within_a_cluster_do_not_narrow_the_interval() -> None:
    once = ClusteredMean.of([0.0, 1.0, 1.0], "abc")
    often = ClusteredMean.of([0.0, 1.0, 1.0] * 8, "abc" * 8)
    assert often.normal_interval() == pytest.approx(once.normal_interval())
    assert often.wilson_interval() == pytest.approx(once.wilson_interval())


@pytest.mark.parametrize(
    ("fraction", "observations", "interval"),
    [(0.8, 10, (0.4902, 0.9433)), (0.0, 10, (0.0, 0.2775)), (1.0, 10, (0.7225, 1.0)), (0.5, 0, (0.0, 1.0))],
)
def test_wilson_interval(fraction: float, observations: int, interval: tuple[float, float]) -> None:
    assert compute_wilson_interval(fraction, observations) == pytest.approx(interval, abs=1e-4)


def test_undefined_interval_has_no_metrics() -> None:
    alone = ClusteredMean.of([1.0, 2.0], "aa")
    assert name_interval("x", alone.normal_interval()) == {}
    assert name_interval("x", (0.25, 0.5)) == {"x/ci95_low": 0.25, "x/ci95_high": 0.5}
    assert math.isnan(ClusteredMean().mean)


@pytest.mark.slow
def test_coverage_of_the_interval() -> None:
    rng = random.Random(0)
    covered = trusted_too_much = 0
    for _ in range(1000):
        values, clusters = [], []
        for cluster in range(40):
            shared = rng.gauss(0, 1)
            values += [shared + rng.gauss(0, 0.5) for _ in range(8)]
            clusters += [cluster] * 8
        low, high = ClusteredMean.of(values, clusters).normal_interval()
        covered += low <= 0 <= high
        low, high = ClusteredMean.of(values, range(len(values))).normal_interval()
        trusted_too_much += low <= 0 <= high
    assert 0.93 <= covered / 1000 <= 0.97
    assert trusted_too_much / 1000 < 0.7  # assumes independent rollouts of a prompt
