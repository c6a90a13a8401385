"""The SDPO loss: token losses of distillation, GRPO and regularization, and their aggregation.

    loss = policy_loss_weight * GRPO + (1 - policy_loss_weight) * weight * SDPO

SDPO: the divergence between student and teacher at each distilled token, times the truncated ratio student / old
policy, times the truncated rollout weight. GRPO: PPO's clipped surrogate with group-relative advantages, at every
response token. KL to the reference model and entropy: see ``regularization``.

The functions take packed tokens [N]; ``official`` has the official function of padded batches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdpo.algorithm.divergence import (
    add_tail,
    compute_divergence,
    compute_entropy,
    compute_sampled_token_surrogate,
    renormalize,
)
from sdpo.algorithm.importance_sampling import compute_ratio
from sdpo.algorithm.regularization import Regularization, estimate_kl
from sdpo.algorithm.sums import Sums, TokenValues, reduce_values
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.observability import metrics


@dataclass(frozen=True)
class LossInputs:
    """Packed response tokens of several samples. Only the student's tensors receive gradients.

    The weights are each token's factor in the aggregated loss (``compute_token_weights``). So the loss summed over
    micro-batches is the loss of the mini-batch, for any split into micro-batches.
    """

    student_log_probs: Tensor  # [N] log-probabilities of the sampled tokens
    old_log_probs: Tensor  # [N]
    policy_weights: Tensor | None = None  # [N] weights among all response tokens, for GRPO, KL and entropy
    advantages: Tensor | None = None  # [N]
    rollout_is_weights: Tensor | None = None  # [N] truncated, detached
    student_entropies: Tensor | None = None  # [N] in nats; with a gradient if regularization has an entropy term
    ref_log_probs: Tensor | None = None  # [N] the reference model's for the sampled tokens
    regularization: Regularization | None = None

    distilled: Tensor | None = None  # [N] bool, M of them set
    distillation_weights: Tensor | None = None  # [M]
    teacher_log_probs: Tensor | None = None  # [M]
    student_distribution: Tensor | None = None  # [M, V] or [M, K] log-probabilities (K: the student's top k)
    teacher_distribution: Tensor | None = None  # [M, V] or [M, K], same entries
    topk_ids: Tensor | None = None  # [M, K] vocabulary ids of the kept entries; compute_loss ignores them
    divergence: Tensor | None = None  # [M] of whole distributions, if already computed
    teacher_entropy: Tensor | None = None  # [M] of whole distributions, if already computed
    distillation_coef: float = 1.0  # the scheduled weight, >= 0

    def at_distilled(self, values: Tensor) -> Tensor:
        """Select the distilled tokens [M] of values [N]; if all are, skip the mask, which would synchronize a GPU."""
        assert self.distilled is not None and self.teacher_log_probs is not None
        return values if len(self.teacher_log_probs) == len(values) else values[self.distilled]


@dataclass(frozen=True)
class LossOutputs:
    """The loss to differentiate, its contributions by token, and sums for metrics."""

    loss: Tensor  # scalar
    token_losses: Tensor  # [N] weighted contribution of each token; their sum is the loss
    sums: Sums


def _normalize_support(inputs: LossInputs, config: SelfDistillationConfig) -> LossInputs:
    """Make distributions of the top k entries [M, K]: [M, K + 1] with a tail entry, or [M, K] renormalised."""
    if config.distillation_topk is None or not config.full_logit_distillation:
        return inputs
    student, teacher = inputs.student_distribution, inputs.teacher_distribution
    assert student is not None and teacher is not None
    complete = add_tail if config.distillation_add_tail else renormalize
    return replace(inputs, student_distribution=complete(student), teacher_distribution=complete(teacher.detach()))


def _compute_token_divergence(inputs: LossInputs, config: SelfDistillationConfig) -> Tensor:
    """Divergence of each distilled token in nats, [M]; at the sampled-token level, its surrogate."""
    if inputs.divergence is not None:
        return inputs.divergence
    if not config.full_logit_distillation:
        assert inputs.teacher_log_probs is not None
        return compute_sampled_token_surrogate(inputs.at_distilled(inputs.student_log_probs), inputs.teacher_log_probs)
    assert inputs.student_distribution is not None and inputs.teacher_distribution is not None
    return compute_divergence(inputs.student_distribution, inputs.teacher_distribution.detach(), config.alpha)


def _compute_clip_factor(divergence: Tensor, limit: float) -> Tensor:
    # Scaled, not clamped: a clamp would zero the gradient of the tokens with the largest divergence.
    return limit / divergence.detach().abs().clamp(min=limit)


def _compute_teacher_entropy(inputs: LossInputs) -> Tensor:
    if inputs.teacher_entropy is not None:
        return inputs.teacher_entropy
    assert inputs.teacher_distribution is not None
    return compute_entropy(inputs.teacher_distribution.detach())


def compute_distillation_token_losses(inputs: LossInputs, config: SelfDistillationConfig) -> tuple[Tensor, TokenValues]:
    """Loss of each distilled token [M] before aggregation, and the values of its metrics."""
    inputs = _normalize_support(inputs, config)
    assert inputs.teacher_log_probs is not None
    student_log_probs = inputs.at_distilled(inputs.student_log_probs)
    losses = _compute_token_divergence(inputs, config)
    # The sampled token's surrogate is not a divergence; the log-ratio, of either sign, estimates the divergence.
    divergence = losses if config.full_logit_distillation else student_log_probs - inputs.teacher_log_probs
    if config.divergence_clip is not None:
        losses = losses * _compute_clip_factor(divergence, config.divergence_clip)
    gap = (inputs.teacher_log_probs - student_log_probs).detach()
    values = {
        metrics.DIVERGENCE: divergence,
        metrics.TEACHER_GAP: gap,
        metrics.GAP_POSITIVE_FRACTION: (gap > 0).to(gap.dtype),
        metrics.GAP_POSITIVE_PART: gap.clamp(min=0),
        metrics.GAP_NEGATIVE_PART: gap.clamp(max=0),
    }
    if config.teacher_entropy_beta:
        losses = losses * torch.exp(-config.teacher_entropy_beta * _compute_teacher_entropy(inputs))
    if config.is_clip is not None:
        ratio = compute_ratio(student_log_probs.detach(), inputs.at_distilled(inputs.old_log_probs))
        values[metrics.IS_CLIP_FRACTION] = (ratio > config.is_clip).to(losses.dtype)
        ratio = ratio.clamp(max=config.is_clip)
        values[metrics.IS_RATIO_MEAN] = ratio
        losses = losses * ratio
    if inputs.rollout_is_weights is not None:
        losses = losses * inputs.at_distilled(inputs.rollout_is_weights)
    return losses, values


def compute_policy_token_losses(inputs: LossInputs, config: SelfDistillationConfig) -> tuple[Tensor, TokenValues]:
    """PPO's clipped surrogate of each response token [N] before aggregation, and the values of its metrics.

    Source: PPO (arXiv 1707.06347) eq. 7 with separate bounds (DAPO, arXiv 2503.14476). Departure from verl: no dual
    clip.
    """
    assert inputs.advantages is not None
    ratio = compute_ratio(inputs.student_log_probs, inputs.old_log_probs)
    clipped = ratio.clamp(1.0 - config.clip_ratio_low, 1.0 + config.clip_ratio_high)
    losses = torch.maximum(-inputs.advantages * ratio, -inputs.advantages * clipped)
    clip_active = (-inputs.advantages * clipped > -inputs.advantages * ratio).to(losses.dtype)
    values = {metrics.PG_CLIPFRAC: clip_active, metrics.ADVANTAGES_MEAN: inputs.advantages}
    if inputs.rollout_is_weights is not None:
        losses = losses * inputs.rollout_is_weights
    return losses, values


def compute_regularization_token_losses(
    inputs: LossInputs, regularization: Regularization
) -> tuple[Tensor, TokenValues]:
    """Weighted KL and entropy terms of each response token [N], and the values of their metrics."""
    assert inputs.policy_weights is not None
    losses, values = torch.zeros_like(inputs.student_log_probs), {}
    if regularization.kl_loss_coef is not None:
        assert inputs.ref_log_probs is not None
        kl = estimate_kl(inputs.student_log_probs, inputs.ref_log_probs, regularization.kl_loss_type)
        values[metrics.KL_LOSS] = kl * inputs.policy_weights
        losses = losses + regularization.kl_loss_coef * values[metrics.KL_LOSS]
    if regularization.entropy_coeff:
        assert inputs.student_entropies is not None
        losses = losses - regularization.entropy_coeff * inputs.student_entropies * inputs.policy_weights
    return losses, values


def compute_token_losses(inputs: LossInputs, config: SelfDistillationConfig) -> tuple[Tensor, TokenValues]:
    """Contribution of each token to the blended loss, [N], and the metrics' values for ``reduce_values``."""
    # Zeros with a graph, so that backward works even if no token is distilled.
    contributions = 0.0 * inputs.student_log_probs
    values: TokenValues = {metrics.PPO_KL: inputs.old_log_probs - inputs.student_log_probs}
    if config.policy_loss_weight > 0.0:
        assert inputs.policy_weights is not None
        policy_losses, policy_values = compute_policy_token_losses(inputs, config)
        policy_losses = policy_losses * inputs.policy_weights
        contributions = contributions + config.policy_loss_weight * policy_losses
        values |= policy_values | {metrics.PG_LOSS: policy_losses}
    weights = inputs.distillation_weights
    if config.distills and inputs.distilled is not None and weights is not None and len(weights) > 0:
        losses, distillation_values = compute_distillation_token_losses(inputs, config)
        losses = losses * weights
        scaled = ((1.0 - config.policy_loss_weight) * inputs.distillation_coef * losses).to(contributions.dtype)
        if len(scaled) == len(contributions):
            contributions = contributions + scaled
        else:
            contributions = contributions.masked_scatter(inputs.distilled, contributions[inputs.distilled] + scaled)
        values |= distillation_values | {metrics.DISTILLATION_LOSS: losses}
    if inputs.regularization is not None:
        losses, regularization_values = compute_regularization_token_losses(inputs, inputs.regularization)
        contributions = contributions + losses
        values |= regularization_values
    return contributions, values | {metrics.LOSS: contributions}


def compute_loss(inputs: LossInputs, config: SelfDistillationConfig) -> LossOutputs:
    """The blended loss of packed tokens.

    Non-finite token losses are returned unchanged; the caller drops the sample and recomputes. Masking the loss would
    not be enough: the backward pass multiplies NaN by 0, which gives NaN gradients.
    """
    contributions, values = compute_token_losses(inputs, config)
    return LossOutputs(contributions.sum(), contributions, reduce_values(values))
