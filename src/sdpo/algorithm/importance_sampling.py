"""Importance ratios between student and old policy, and between old policy and sampler.

Student and old policy differ after several updates on a batch; old policy and sampler differ in engine, precision or
staleness. The log-probabilities of the three policies:

    rollout_log_probs   by the sampler, with its weights at the time of sampling
    old_log_probs       by the actor, with its weights at the start of the step
    student_log_probs   by the actor, with its current weights
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Keeps exp() finite in every floating-point type; the official code uses the same bound.
MAX_LOG_RATIO = 20.0


def compute_ratio(
    log_probs: Float[Tensor, "*axes"], reference_log_probs: Float[Tensor, "*axes"]
) -> Float[Tensor, "*axes"]:
    """exp(log_probs - reference), exponent clamped to [-20, 20]; no gradient by the reference."""
    return (log_probs - reference_log_probs.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def compute_rollout_ratio(
    old_log_probs: Float[Tensor, "N"], rollout_log_probs: Float[Tensor, "N"], sample_index: Int[Tensor, "N"], level: str
) -> Float[Tensor, "N"] | None:
    """Importance ratio old policy / sampler of packed tokens, before truncation.

    Args:
        sample_index: each token's sample, from 0.
        level: ``"token"``; ``"sequence"``, the product over the sample's tokens, at each token; or ``"none"``.

    Returns:
        Positive, without gradient; None for ``"none"``.

    Raises:
        ValueError: unknown level.

    Source: verl's rollout correction (truncated importance sampling).
    """
    if level == "none":
        return None
    log_ratio = (old_log_probs - rollout_log_probs).detach()
    if level == "sequence":
        num_samples = int(sample_index.max()) + 1
        by_sample = log_ratio.new_zeros(num_samples).index_add_(0, sample_index, log_ratio)
        log_ratio = by_sample[sample_index]
    elif level != "token":
        raise ValueError(f"rollout_is must be one of none, token, sequence, got {level!r}")
    return compute_ratio(log_ratio, torch.zeros_like(log_ratio))
