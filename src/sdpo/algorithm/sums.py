"""Named sums from which metrics are computed, for any split of a mini-batch into micro-batches.

``sdpo.observability.metrics.LOSS_METRICS`` maps the names to metrics.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

# name -> (sum, count), added over micro-batches; a count of 0 marks a total
Sums: TypeAlias = dict[str, tuple[Float[Tensor, ""], Int[Tensor, ""]]]
# name -> values by token, N or M of them; the metric is their mean, or their sum if the name is in TOTALS
TokenValues: TypeAlias = dict[str, Float[Tensor, "_"]]
# Values that are already weighted: their sum over micro-batches is the metric.
TOTALS = {"policy_loss", "distillation_loss", "kl_loss", "loss"}


def add_sums(sums: Sums, more: Sums) -> None:
    """Add the sums of another micro-batch in place."""
    for name, (total, count) in more.items():
        before = sums.get(name)
        sums[name] = (total, count) if before is None else (before[0] + total, before[1] + count)


def mean_of(values: Float[Tensor, "..."]) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Sum and count of a metric's values."""
    values = values.detach()
    return values.sum(), torch.full((), values.numel(), device=values.device)


def reduce_values(values: TokenValues) -> Sums:
    """Sums and counts of the metrics."""
    return {name: _total(each) if name in TOTALS else mean_of(each) for name, each in values.items()}


def _total(values: Float[Tensor, "_"]) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    return values.detach().sum(), torch.zeros((), dtype=torch.long, device=values.device)
