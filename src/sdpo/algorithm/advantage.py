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
        A response without others in its group gets 0 (departure from verl, which keeps the raw score). A non-finite
        score gets 0 and is left out of its group's statistics.

    Source: DeepSeekMath (arXiv 2402.03300), section 4.1; verl ``compute_grpo_outcome_advantage``.
    """
    finite = torch.isfinite(scores)
    clean = scores.masked_fill(~finite, 0.0)
    _, index = torch.unique(group_index, return_inverse=True)
    num_groups = int(index.max()) + 1 if index.numel() else 0

    def sum_over_group(values: Tensor) -> Tensor:
        return values.new_zeros(num_groups).index_add(0, index, values)

    count = sum_over_group(finite.to(clean.dtype))
    mean = sum_over_group(clean) / count.clamp(min=1)
    advantages = (clean - mean[index]).masked_fill(~finite, 0.0)
    if norm_by_std:
        variance = sum_over_group(advantages.square()) / (count - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt()[index] + epsilon)
    return advantages
