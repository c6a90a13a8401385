"""95 % confidence intervals of means over rollouts and tokens.

Rollouts of one prompt are correlated, and so are the tokens of one rollout. Each prompt therefore counts as one
observation (a cluster), however many rollouts and tokens it has.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable

from sdpo.observability.metrics import ci95_names

Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


class ClusteredMean:
    """Mean over values in clusters, with its confidence interval.

    The standard error of k clusters is sqrt(k / (k - 1) * sum_i (total_i - mean * count_i)^2) / count: a ratio of two
    sums over independent clusters, linearised (Cochran, Sampling Techniques, section 6.4).
    """

    def __init__(self) -> None:
        self._clusters: dict[Hashable, tuple[float, float]] = {}

    @classmethod
    def of(cls, values: Iterable[float], clusters: Iterable[Hashable]) -> ClusteredMean:
        """Build the mean of values, each with its cluster."""
        mean = cls()
        for value, cluster in zip(values, clusters, strict=True):
            mean.add(cluster, value, 1)
        return mean

    def add(self, cluster: Hashable, total: float, count: float) -> None:
        """Add ``count`` values of a cluster with the sum ``total``."""
        before_total, before_count = self._clusters.get(cluster, (0.0, 0.0))
        self._clusters[cluster] = (before_total + total, before_count + count)

    @property
    def num_clusters(self) -> int:
        """Number of clusters with a value."""
        return sum(count > 0 for _, count in self._clusters.values())

    @property
    def mean(self) -> float:
        """Mean over all values; NaN without any."""
        count = sum(count for _, count in self._clusters.values())
        return sum(total for total, _ in self._clusters.values()) / count if count else math.nan

    def normal_interval(self) -> tuple[float, float]:
        """Mean -+ 1.96 standard errors; (-inf, inf) for fewer than two clusters."""
        clusters = [(total, count) for total, count in self._clusters.values() if count > 0]
        k = len(clusters)
        if k < 2:
            return -math.inf, math.inf
        squares = sum((total - self.mean * count) ** 2 for total, count in clusters)
        half = Z95 * math.sqrt(k / (k - 1) * squares) / sum(count for _, count in clusters)
        return self.mean - half, self.mean + half

    def wilson_interval(self) -> tuple[float, float]:
        """Wilson's interval of a mean of values in [0, 1], with one observation per cluster.

        Zeros and ones have the highest variance of all values in [0, 1], so the interval is conservative. It has a
        positive width even if all values are equal.
        """
        return compute_wilson_interval(self.mean, self.num_clusters)


def compute_wilson_interval(fraction: float, num_observations: int) -> tuple[float, float]:
    """Wilson's interval of a fraction in [0, 1] of independent observations; (0, 1) without any.

    Source: Wilson, JASA 22 (1927), the score interval.
    """
    n = num_observations
    if n == 0:
        return 0.0, 1.0
    centre = (fraction + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(fraction * (1 - fraction) / n + Z95**2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def name_interval(metric: str, interval: tuple[float, float]) -> dict[str, float]:
    """The interval as two metrics; empty for an infinite interval."""
    return dict(zip(ci95_names(metric), interval, strict=True)) if all(map(math.isfinite, interval)) else {}
