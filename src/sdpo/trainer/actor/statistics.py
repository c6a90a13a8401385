"""Aggregation of metrics over mini-batches and tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from sdpo.algorithm.sums import Sums, add_sums
from sdpo.observability import metrics
from sdpo.observability.confidence import ClusteredMean, name_interval


def average_mini_batches(results: Sequence[dict[str, float]]) -> dict[str, float]:
    """Average each metric over mini-batches; sum counters and return the last learning rate."""
    collected: dict[str, list[float]] = defaultdict(list)
    for result in results:
        for name, value in result.items():
            collected[name].append(value)
    values = {name: sum(many) / len(many) for name, many in collected.items()}
    for name in (metrics.NONFINITE_SAMPLES, metrics.SKIPPED_UPDATES):
        values[name] = sum(collected[name])
    return values | {metrics.LR: results[-1][metrics.LR]}


def sum_by_sample(values: Tensor, sample_index: Tensor, num_samples: int) -> Tensor:
    """Sums [num_samples] of token values [N], and below them the numbers of tokens: [2, num_samples].

    Args:
        sample_index: [N], each token's sample.
    """
    rows = torch.stack([values.detach(), torch.ones_like(values)])
    return rows.new_zeros(2, num_samples).index_add_(1, sample_index, rows)


@dataclass
class MiniBatchStatistics:
    """Sums over the micro-batches of a mini-batch, on the device until ``read``.

    Each read of a tensor waits for the device, so all values are read together, after the last micro-batch.
    """

    _sums: Sums = field(default_factory=dict)
    _by_sample: list[tuple[str, Tensor, Sequence[int]]] = field(default_factory=list)
    _nonfinite: list[tuple[Tensor, Sequence[int]]] = field(default_factory=list)

    def add(self, sums: Sums) -> None:
        """Add the sums of a micro-batch's metrics."""
        add_sums(self._sums, sums)

    def add_by_prompt(self, name: str, by_sample: Tensor, prompts: Sequence[int]) -> None:
        """Add values of which the mean's confidence interval is wanted.

        Args:
            name: of the metric.
            by_sample: from ``sum_by_sample``.
            prompts: identity of each sample's prompt.
        """
        self._by_sample.append((name, by_sample, prompts))

    def add_nonfinite(self, num_tokens: Tensor, samples: Sequence[int]) -> None:
        """Add the numbers of non-finite tokens [S] of these samples."""
        self._nonfinite.append((num_tokens, samples))

    def read(self) -> tuple[dict[str, float], set[int]]:
        """Means and intervals of the metrics, and the samples with a non-finite token."""
        sums = [value for pair in self._sums.values() for value in pair]
        by_sample = [values for _, values, _ in self._by_sample]
        read = read_together([*sums, *by_sample, *(counts for counts, _ in self._nonfinite)])
        sum_values, sample_values = read[: len(sums)], read[len(sums) :][: len(by_sample)]
        means = {
            name: total / max(count, 1)
            for name, (total,), (count,) in zip(self._sums, sum_values[::2], sum_values[1::2], strict=True)
        }
        spreads: dict[str, ClusteredMean] = defaultdict(ClusteredMean)
        for (name, _, prompts), values in zip(self._by_sample, sample_values, strict=True):
            totals, counts = values[: len(prompts)], values[len(prompts) :]
            for prompt, total, count in zip(prompts, totals, counts, strict=True):
                spreads[name].add(prompt, total, count)
        for name, mean in spreads.items():
            means |= name_interval(name, mean.normal_interval())
        nonfinite = {
            sample
            for (_, samples), counts in zip(self._nonfinite, read[len(sums) + len(by_sample) :], strict=True)
            for sample, count in zip(samples, counts, strict=True)
            if count > 0
        }
        return means, nonfinite


def read_together(tensors: Sequence[Tensor]) -> list[list[float]]:
    """Values of many small tensors of one device, with one read."""
    if not tensors:
        return []
    dtype = torch.float32 if tensors[0].device.type == "mps" else torch.float64
    values = iter(torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors]).tolist())
    return [list(islice(values, tensor.numel())) for tensor in tensors]
