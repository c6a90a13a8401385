"""The distillation loss of each token: divergence between student and teacher, its clips and weights."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sdpo.algorithm.batch import TokenBatch
from sdpo.algorithm.distributions import TokenDistributions
from sdpo.algorithm.divergence import compute_divergence, compute_entropy, compute_sampled_token_surrogate
from sdpo.algorithm.importance_sampling import compute_ratio
from sdpo.algorithm.sums import TokenValues
from sdpo.algorithm.topk import complete_topk
from sdpo.config.self_distillation import SelfDistillationConfig


def _complete(
    log_probs: Float[Tensor, "M V"] | Float[Tensor, "M K"] | None, config: SelfDistillationConfig
) -> Float[Tensor, "M C"]:
    """Compared distributions of student or teacher; with top-k, completed."""
    assert log_probs is not None
    return log_probs if config.distillation_topk is None else complete_topk(log_probs, config)


def _compute_clip_factor(divergence: Float[Tensor, "M"], limit: float) -> Float[Tensor, "M"]:
    # Scaled, not clamped: a clamp would zero the gradient of the tokens with the largest divergence.
    return limit / divergence.detach().abs().clamp(min=limit)


def _compare(
    tokens: TokenDistributions, student_log_probs: Float[Tensor, "M"], config: SelfDistillationConfig
) -> tuple[Float[Tensor, "M"], Float[Tensor, "M"]]:
    """Loss and divergence in nats of each distilled token, from the sampled tokens' log-probabilities."""
    if not config.full_logit_distillation:
        # The surrogate's value is not a divergence; the log-ratio, of either sign, estimates the divergence.
        assert tokens.teacher_log_probs is not None
        surrogate = compute_sampled_token_surrogate(student_log_probs, tokens.teacher_log_probs)
        return surrogate, student_log_probs - tokens.teacher_log_probs
    divergence = tokens.divergence
    if divergence is None:
        student = _complete(tokens.student_distribution, config)
        teacher = _complete(tokens.teacher_distribution, config).detach()
        divergence = compute_divergence(student, teacher, config.alpha)
    return divergence, divergence


def compute_distillation_token_losses(
    batch: TokenBatch, tokens: TokenDistributions, config: SelfDistillationConfig
) -> tuple[Float[Tensor, "M"], TokenValues]:
    """Loss of each distilled token before aggregation, and the values of its metrics."""
    assert tokens.teacher_log_probs is not None
    num_distilled = len(tokens.teacher_log_probs)
    student_log_probs = batch.at_distilled(tokens.student_log_probs, num_distilled)
    losses, divergence = _compare(tokens, student_log_probs, config)
    if config.divergence_clip is not None:
        losses = losses * _compute_clip_factor(divergence, config.divergence_clip)
    gap = (tokens.teacher_log_probs - student_log_probs).detach()
    values = {
        "divergence": divergence,
        "teacher_gap": gap,
        "gap_positive_fraction": (gap > 0).to(gap.dtype),
        "gap_positive_part": gap.clamp(min=0),
        "gap_negative_part": gap.clamp(max=0),
    }
    if config.teacher_entropy_beta:
        entropies = tokens.compared_teacher_entropies
        if entropies is None:
            entropies = compute_entropy(_complete(tokens.teacher_distribution, config).detach())
        losses = losses * torch.exp(-config.teacher_entropy_beta * entropies)
    if config.is_clip is not None:
        assert batch.old_log_probs is not None
        ratio = compute_ratio(student_log_probs.detach(), batch.at_distilled(batch.old_log_probs, num_distilled))
        values["is_clip_fraction"] = (ratio > config.is_clip).to(losses.dtype)
        ratio = ratio.clamp(max=config.is_clip)
        values["is_ratio"] = ratio
        losses = losses * ratio
    if batch.rollout_is_weights is not None:
        losses = losses * batch.at_distilled(batch.rollout_is_weights, num_distilled)
    return losses, values
