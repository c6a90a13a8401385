"""Aggregation of metrics over mini-batches and tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from sdpo.observability import metrics
from sdpo.observability.confidence import ClusteredMean


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


def add_by_prompt(mean: ClusteredMean, values: Tensor, sample_index: Tensor, prompts: Sequence[int]) -> None:
    """Add token values [N] to a mean clustered by prompt.

    Args:
        sample_index: [N], index in ``prompts`` of each token's sample.
        prompts: identity of each sample's prompt.
    """
    totals = values.new_zeros(len(prompts)).index_add_(0, sample_index, values)
    counts = values.new_zeros(len(prompts)).index_add_(0, sample_index, torch.ones_like(values))
    for prompt, total, count in zip(prompts, totals.tolist(), counts.tolist(), strict=True):
        mean.add(prompt, total, count)
