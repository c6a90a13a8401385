"""The SDPO loss: token losses of distillation, GRPO and regularization, and their aggregation.

    loss = policy_loss_weight * GRPO + (1 - policy_loss_weight) * weight * SDPO

SDPO: the divergence between student and teacher at each distilled token, times the truncated ratio student / old
policy, times the truncated rollout weight. GRPO: PPO's clipped surrogate with group-relative advantages, at every
response token. KL to the reference model and entropy: see ``regularization``.

The functions take packed tokens; ``distillation`` has the SDPO part, ``official`` the official function of padded
batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sdpo.algorithm.batch import TokenBatch
from sdpo.algorithm.distillation import compute_distillation_token_losses
from sdpo.algorithm.distributions import TokenDistributions
from sdpo.algorithm.importance_sampling import compute_ratio
from sdpo.algorithm.regularization import Regularization, estimate_kl
from sdpo.algorithm.sums import Sums, TokenValues, reduce_values
from sdpo.config.self_distillation import SelfDistillationConfig


@dataclass(frozen=True)
class LossOutputs:
    """The loss to differentiate, its contributions by token, and sums for metrics."""

    loss: Float[Tensor, ""]
    token_losses: Float[Tensor, "N"]  # weighted contribution of each token; their sum is the loss
    sums: Sums


def compute_policy_token_losses(
    batch: TokenBatch, student_log_probs: Float[Tensor, "N"], config: SelfDistillationConfig
) -> tuple[Float[Tensor, "N"], TokenValues]:
    """PPO's clipped surrogate of each response token before aggregation, and the values of its metrics.

    Source: PPO (arXiv 1707.06347) eq. 7 with separate bounds (DAPO, arXiv 2503.14476). Departure from verl: no dual
    clip.
    """
    assert batch.advantages is not None and batch.old_log_probs is not None
    ratio = compute_ratio(student_log_probs, batch.old_log_probs)
    clipped = ratio.clamp(1.0 - config.clip_ratio_low, 1.0 + config.clip_ratio_high)
    losses = torch.maximum(-batch.advantages * ratio, -batch.advantages * clipped)
    clip_active = (-batch.advantages * clipped > -batch.advantages * ratio).to(losses.dtype)
    values = {"policy_clip_fraction": clip_active, "advantage": batch.advantages}
    if batch.rollout_is_weights is not None:
        losses = losses * batch.rollout_is_weights
    return losses, values


def compute_regularization_token_losses(
    batch: TokenBatch, tokens: TokenDistributions, regularization: Regularization
) -> tuple[Float[Tensor, "N"], TokenValues]:
    """Weighted KL and entropy terms of each response token, and the values of their metrics."""
    assert batch.policy_weights is not None
    losses, values = torch.zeros_like(tokens.student_log_probs), {}
    if regularization.kl_loss_coef is not None:
        assert batch.ref_log_probs is not None
        kl = estimate_kl(tokens.student_log_probs, batch.ref_log_probs, regularization.kl_loss_type)
        values["kl_loss"] = kl * batch.policy_weights
        losses = losses + regularization.kl_loss_coef * values["kl_loss"]
    if regularization.entropy_coeff:
        assert tokens.student_entropies is not None
        losses = losses - regularization.entropy_coeff * tokens.student_entropies * batch.policy_weights
    return losses, values


def compute_token_losses(
    batch: TokenBatch, tokens: TokenDistributions, config: SelfDistillationConfig
) -> tuple[Float[Tensor, "N"], TokenValues]:
    """Contribution of each token to the blended loss, and the metrics' values for ``reduce_values``."""
    batch = batch.complete(tokens.student_log_probs)
    assert batch.old_log_probs is not None
    # Zeros with a graph, so that backward works even if no token is distilled.
    contributions = 0.0 * tokens.student_log_probs
    values: TokenValues = {}
    if tokens.student_entropies is not None:
        values["entropy"] = tokens.student_entropies
    if tokens.teacher_entropies is not None:
        values["teacher_entropy"] = tokens.teacher_entropies
    values["ppo_kl"] = batch.old_log_probs - tokens.student_log_probs
    if config.policy_loss_weight > 0.0:
        assert batch.policy_weights is not None
        losses, policy_values = compute_policy_token_losses(batch, tokens.student_log_probs, config)
        losses = losses * batch.policy_weights
        contributions = contributions + config.policy_loss_weight * losses
        values |= policy_values | {"policy_loss": losses}
    num_distilled = 0 if tokens.teacher_log_probs is None else len(tokens.teacher_log_probs)
    if config.distills and batch.distilled is not None and num_distilled > 0:
        assert batch.distillation_weights is not None
        losses, distillation_values = compute_distillation_token_losses(batch, tokens, config)
        losses = losses * batch.at_distilled(batch.distillation_weights, num_distilled)
        scaled = ((1.0 - config.policy_loss_weight) * batch.distillation_coef * losses).to(contributions.dtype)
        if len(scaled) == len(contributions):
            contributions = contributions + scaled
        else:
            contributions = contributions.masked_scatter(batch.distilled, contributions[batch.distilled] + scaled)
        values |= distillation_values | {"distillation_loss": losses}
    if batch.regularization is not None:
        losses, regularization_values = compute_regularization_token_losses(batch, tokens, batch.regularization)
        contributions = contributions + losses
        values |= regularization_values
    return contributions, values | {"loss": contributions}


def compute_loss(batch: TokenBatch, tokens: TokenDistributions, config: SelfDistillationConfig) -> LossOutputs:
    """The blended loss of packed tokens.

    Non-finite token losses are returned unchanged; the caller drops the sample and recomputes. Masking the loss would
    not be enough: the backward pass multiplies NaN by 0, which gives NaN gradients.
    """
    contributions, values = compute_token_losses(batch, tokens, config)
    return LossOutputs(contributions.sum(), contributions, reduce_values(values))
