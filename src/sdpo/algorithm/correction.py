"""Importance ratios: between student and old policy (several updates on one batch), and between old policy and sampler
(another engine, other precision, older weights). Three policies, three sets of log-probabilities:

    rollout_log_probs   by the sampler, with the weights it had, as it sampled
    old_log_probs       by the learner, with its weights at the start of the step
    student_log_probs   by the learner, with its weights now
"""

from __future__ import annotations

import torch
from torch import Tensor

# Keeps exp() finite in every floating-point type; the official code uses the same bound.
MAX_LOG_RATIO = 20.0


def compute_ratio(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """exp(log_probs - reference), the exponent held in [-20, 20]; any shape, positive; the reference is a constant."""
    return (log_probs - reference_log_probs.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def compute_rollout_ratio(
    old_log_probs: Tensor, rollout_log_probs: Tensor, response_mask: Tensor, level: str
) -> Tensor | None:
    """Importance ratio old policy / sampler, before truncation.

    Args:
        old_log_probs, rollout_log_probs: [B, T].
        response_mask: [B, T].
        level: ``"token"``; ``"sequence"``, the product over the response, for all of its tokens; or ``"none"``.

    Returns:
        [B, T], positive, without gradient, 1 outside the mask; None for ``"none"``.

    Raises:
        ValueError: unknown level.

    Source: verl's rollout correction (truncated importance sampling).
    """
    if level == "none":
        return None
    mask = response_mask.bool()
    log_ratio = (old_log_probs - rollout_log_probs).detach().masked_fill(~mask, 0.0)
    if level == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True).expand_as(log_ratio).masked_fill(~mask, 0.0)
    elif level != "token":
        raise ValueError(f"rollout_is must be one of none, token, sequence, got {level!r}")
    return compute_ratio(log_ratio, torch.zeros_like(log_ratio))
