"""Group-relative advantages of GRPO, one number per response."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor


def compute_group_advantages(
    scores: Real[Tensor, "B"], group_index: Int[Tensor, "B"], *, norm_by_std: bool = True, epsilon: float = 1e-6
) -> Float[Tensor, "B"]:
    """Score minus the group's mean score, optionally divided by the group's standard deviation.

    Args:
        scores: the responses' scores.
        group_index: equal for responses to the same prompt.
        norm_by_std: divide by the group's sample standard deviation (Bessel-corrected, as verl does) plus ``epsilon``;
            without it the advantages are those of Dr. GRPO.

    Returns:
        In the data type of ``scores``; computed in float64, because the deviation of equal scores in float32 is a
        rounding error that the division makes as large as an advantage. Equal scores get exactly 0. A response without
        others in its group gets 0 (departure from verl, which keeps the raw score). A non-finite score gets 0 and is
        left out of its group's statistics.

    Source: DeepSeekMath (arXiv 2402.03300), section 4.1; verl ``compute_grpo_outcome_advantage``.
    """
    result_dtype = scores.dtype if scores.is_floating_point() else torch.get_default_dtype()
    finite = torch.isfinite(scores)
    clean = scores.masked_fill(~finite, 0.0).double()
    _, index = torch.unique(group_index, return_inverse=True)
    num_groups = int(index.max()) + 1 if index.numel() else 0

    def reduce(values: Tensor, operation: str) -> Tensor:
        """Reduce each group's entries with finite scores [B] to one value, repeated for each of its responses."""
        result = values.new_zeros(num_groups)
        return result.scatter_reduce(0, index[finite], values[finite], operation, include_self=False)[index]

    centered = clean - reduce(clean, "mean")
    centered = centered.masked_fill(~finite | (reduce(clean, "amax") == reduce(clean, "amin")), 0.0)
    if norm_by_std:
        # In units of the largest one, so that no square overflows.
        unit = reduce(centered.abs(), "amax").clamp(min=torch.finfo(torch.float64).tiny)
        ratio = centered / unit
        count = reduce(finite.double(), "sum")
        deviation = (reduce(ratio.square(), "sum") / (count - 1).clamp(min=1)).sqrt()
        centered = ratio / (deviation + epsilon / unit)
    return centered.to(result_dtype)
