"""How sure an average is: intervals of 95 % for what a step estimates from the rollouts it happened to draw.

Rollouts of one prompt are alike, and so are the tokens of one rollout. So a prompt is one observation, however many
rollouts and tokens it has: what is within it makes no interval narrower.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable

from sdpo.observability.metrics import ci95_names

Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


class ClusteredMean:
    """A mean over many values in few clusters: sum of the values / their number, and how far that may be off.

    The standard error is that of a ratio of two sums over independent clusters (linearised; Cochran, Sampling
    Techniques, section 6.4): sqrt(k / (k - 1) * sum (total_i - mean * count_i)^2) / count, of k clusters.
    """

    def __init__(self) -> None:
        self._clusters: dict[Hashable, tuple[float, float]] = {}

    @classmethod
    def of(cls, values: Iterable[float], clusters: Iterable[Hashable]) -> ClusteredMean:
        """The mean of some values, each with its cluster."""
        mean = cls()
        for value, cluster in zip(values, clusters, strict=True):
            mean.add(cluster, value, 1)
        return mean

    def add(self, cluster: Hashable, total: float, count: float) -> None:
        """``count`` values of a cluster, which add up to ``total``."""
        before_total, before_count = self._clusters.get(cluster, (0.0, 0.0))
        self._clusters[cluster] = (before_total + total, before_count + count)

    @property
    def num_clusters(self) -> int:
        """Those that have a value."""
        return sum(count > 0 for _, count in self._clusters.values())

    @property
    def mean(self) -> float:
        """NaN of nothing."""
        count = sum(count for _, count in self._clusters.values())
        return sum(total for total, _ in self._clusters.values()) / count if count else math.nan

    def normal_interval(self) -> tuple[float, float]:
        """Mean -+ 1.96 standard errors; from -inf to inf where there are fewer than two clusters."""
        clusters = [(total, count) for total, count in self._clusters.values() if count > 0]
        k = len(clusters)
        if k < 2:
            return -math.inf, math.inf
        squares = sum((total - self.mean * count) ** 2 for total, count in clusters)
        half = Z95 * math.sqrt(k / (k - 1) * squares) / sum(count for _, count in clusters)
        return self.mean - half, self.mean + half

    def wilson_interval(self) -> tuple[float, float]:
        """Of a mean of values in [0, 1]: Wilson's interval for as many observations as there are clusters.

        No values in [0, 1] vary more than zeros and ones do, so it is never too narrow for want of spread in the
        sample: it has a width where all values are equal too.
        """
        return compute_wilson_interval(self.mean, self.num_clusters)


def compute_wilson_interval(share: float, num_observations: int) -> tuple[float, float]:
    """Wilson's interval for a share in [0, 1] of so many independent observations; (0, 1) of none.

    Source: Wilson, JASA 22 (1927), the score interval.
    """
    n = num_observations
    if n == 0:
        return 0.0, 1.0
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def name_interval(metric: str, interval: tuple[float, float]) -> dict[str, float]:
    """Both ends under the metric's name; nothing where they are not known."""
    return dict(zip(ci95_names(metric), interval, strict=True)) if all(map(math.isfinite, interval)) else {}
