"""Packed tokens: the inputs of the loss that do not depend on the distributions of student and teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from sdpo.algorithm.importance_sampling import compute_ratio
from sdpo.algorithm.regularization import Regularization


@dataclass(frozen=True)
class TokenBatch:
    """N packed response tokens of several samples, M of them distilled. No tensor receives a gradient.

    The weights are each token's factor in the aggregated loss (``aggregation.compute_token_weights``). So the loss
    summed over micro-batches is the loss of the mini-batch, for any split into micro-batches.
    """

    sampled_ids: Int[Tensor, "N"] | None = None  # needed to read the sampled tokens' entries in distributions
    old_log_probs: Float[Tensor, "N"] | None = None  # None: the student's, as with one optimizer step per batch
    policy_weights: Float[Tensor, "N"] | None = None  # among all response tokens, for GRPO, KL and entropy
    advantages: Float[Tensor, "N"] | None = None
    rollout_is_weights: Float[Tensor, "N"] | None = None  # truncated ratios old policy / sampler
    rollout_log_probs: Float[Tensor, "N"] | None = None  # for rollout_is_weights by token if these are None
    rollout_is_threshold: float = math.inf  # upper bound of the weights computed from rollout_log_probs
    distilled: Bool[Tensor, "N"] | None = None  # M of them set
    distillation_weights: Float[Tensor, "N"] | None = None  # read at distilled tokens
    distillation_coef: float = 1.0  # the scheduled weight, >= 0
    ref_log_probs: Float[Tensor, "N"] | None = None  # the reference model's for the sampled tokens
    regularization: Regularization | None = None

    @property
    def has_entropy_term(self) -> bool:
        """Whether the loss depends on the student's entropies."""
        return self.regularization is not None and self.regularization.entropy_coeff != 0.0

    def select(self, rows: Int[Tensor, "rows"] | slice) -> TokenBatch:
        """The batch of these rows."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        chosen: dict[str, Any] = {name: value[rows] for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **chosen)

    def at_distilled(self, values: Shaped[Tensor, "N *rest"], num_distilled: int) -> Shaped[Tensor, "M *rest"]:
        """Values at the distilled tokens; if all tokens are, without the mask, which would synchronize a GPU."""
        if num_distilled == len(values):
            return values
        assert self.distilled is not None
        return values[self.distilled]

    def complete(self, student_log_probs: Float[Tensor, "N"]) -> TokenBatch:
        """Fill in ``old_log_probs`` and ``rollout_is_weights`` from the student's log-probabilities."""
        old = student_log_probs.detach() if self.old_log_probs is None else self.old_log_probs
        weights = self.rollout_is_weights
        if weights is None and self.rollout_log_probs is not None:
            weights = compute_ratio(old, self.rollout_log_probs).clamp(max=self.rollout_is_threshold)
        return replace(self, old_log_probs=old, rollout_is_weights=weights)
