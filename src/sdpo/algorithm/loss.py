"""The SDPO loss: token losses of distillation, GRPO and regularization, and their aggregation.

    loss = policy_loss_weight * GRPO + (1 - policy_loss_weight) * weight * SDPO

SDPO: the divergence between student and teacher at each distilled token, times the truncated ratio student / old
policy, times the truncated rollout weight. GRPO: PPO's clipped surrogate with group-relative advantages, at every
response token. KL to the reference model and entropy: see ``regularization``.

``compute_loss`` takes packed tokens [N]; ``compute_self_distillation_loss`` is a wrapper with the official signature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

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
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.observability import metrics

# metric -> (sum, count), added over micro-batches; a count of 0 marks a total
Sums: TypeAlias = dict[str, tuple[Tensor, Tensor]]
# metric -> its values by token, [N] or [M]; the metric is their mean, or their sum if it is in TOTALS
TokenValues: TypeAlias = dict[str, Tensor]
# Values that are already weighted: their sum over micro-batches is the metric.
TOTALS = {metrics.PG_LOSS, metrics.DISTILLATION_LOSS, metrics.KL_LOSS, metrics.LOSS}


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


def compute_token_weights(num_tokens: Tensor, loss_agg_mode: str, horizon: int | None = None) -> Tensor:
    """Weight of a token of each sample in the aggregated loss.

    Args:
        num_tokens: [B], counted tokens of each sample; samples with 0 are left out of the mean over sequences.
        loss_agg_mode: ``token-mean`` 1 / all tokens; ``seq-mean-token-sum`` 1 / sequences; ``seq-mean-token-mean``
            1 / (sequences * the sample's tokens); ``seq-mean-token-sum-norm`` 1 / (sequences * horizon).
        horizon: constant of ``seq-mean-token-sum-norm``, in tokens; ignored by the other modes.

    Returns:
        [B] float, at least float32.

    Raises:
        ValueError: unknown mode, or a missing horizon.

    Source: verl ``agg_loss``. ``token-mean`` counts distilled tokens, as the official code does.
    """
    counts = num_tokens.to(torch.float64 if num_tokens.dtype == torch.float64 else torch.float32)
    present = (counts > 0).to(counts.dtype)
    num_sequences = present.sum().clamp(min=1)
    if loss_agg_mode == "token-mean":
        return present / counts.sum().clamp(min=1)
    if loss_agg_mode == "seq-mean-token-sum":
        return present / num_sequences
    if loss_agg_mode == "seq-mean-token-mean":
        return present / (num_sequences * counts.clamp(min=1))
    if loss_agg_mode == "seq-mean-token-sum-norm":
        if horizon is None:
            raise ValueError("loss_agg_mode seq-mean-token-sum-norm needs a horizon")
        return present / (num_sequences * horizon)
    raise ValueError(f"unknown loss_agg_mode {loss_agg_mode!r}")


def compute_distillation_coef(config: SelfDistillationConfig, step: int, max_steps: int) -> float:
    """Weight of the distillation loss at step 1 ... max_steps: linear from start to end."""
    progress = 0.0 if max_steps <= 1 else (step - 1) / (max_steps - 1)
    return config.distillation_coef_start + progress * (config.distillation_coef_end - config.distillation_coef_start)


def compute_prompt_weights(success_rates: Tensor) -> Tensor:
    """sqrt(p (1 - p)) of each sample's prompt, [B] in [0, 0.5]; 0 if all rollouts succeed or all fail."""
    return (success_rates * (1.0 - success_rates)).clamp(min=0).sqrt()


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


def compute_self_distillation_loss(
    student_log_probs: Tensor,
    teacher_log_probs: Tensor,
    response_mask: Tensor,
    self_distillation_config: SelfDistillationConfig,
    old_log_probs: Tensor | None = None,
    student_all_log_probs: Tensor | None = None,
    teacher_all_log_probs: Tensor | None = None,
    student_topk_log_probs: Tensor | None = None,
    teacher_topk_log_probs: Tensor | None = None,
    self_distillation_mask: Tensor | None = None,
    loss_agg_mode: str = "token-mean",
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Distillation loss of a padded batch, with the signature of the official function (lasgroup/SDPO).

    Args:
        student_log_probs: [B, T], log-probabilities of the sampled tokens, with gradient.
        teacher_log_probs: [B, T], the teacher's for the same tokens; never receives a gradient.
        response_mask: [B, T], 1 at response tokens.
        self_distillation_config: divergence, level and clips. ``policy_loss_weight`` is not applied: the result is the
            distillation loss alone.
        old_log_probs: [B, T], required unless ``is_clip`` is None.
        student_all_log_probs, teacher_all_log_probs: [B, T, V], for the full vocabulary.
        student_topk_log_probs, teacher_topk_log_probs: [B, T, K], both at the student's top k, for top-k.
        self_distillation_mask: [B], 1 for samples with teacher context.
        loss_agg_mode: see ``compute_token_weights``; the horizon of ``seq-mean-token-sum-norm`` is T.
        rollout_is_weights: [B, T], truncated importance weights old policy / sampler.

    Returns:
        The scalar loss and its metrics. Without distilled tokens the loss is exactly 0, with a zero gradient.

    Raises:
        ValueError: a tensor that the settings require is missing.

    Departures from the official function:
    - Samples with a non-finite value are removed from the batch and counted in
      ``self_distillation/nonfinite_samples``.
    - Values at masked positions are ignored, even NaN.
    - ``seq-mean-token-sum-norm`` also divides by the number of sequences, as current verl does.
    - The options that this package adds to the config apply.
    """
    config = self_distillation_config
    _require_tensors(config, locals())
    mask = response_mask.bool()
    if self_distillation_mask is not None:
        mask = mask & self_distillation_mask.bool().unsqueeze(-1)
    student_distribution = teacher_distribution = None
    if config.full_logit_distillation:
        student_distribution, teacher_distribution = (
            (student_topk_log_probs, teacher_topk_log_probs)
            if config.distillation_topk is not None
            else (student_all_log_probs, teacher_all_log_probs)
        )
    token_values = (student_log_probs, teacher_log_probs, old_log_probs, rollout_is_weights)
    broken = _find_nonfinite_tokens(mask, token_values, (student_distribution, teacher_distribution))
    num_dropped = 0
    while True:
        nonfinite = (mask & broken).any(-1)
        num_dropped += int(nonfinite.sum())
        mask = mask & ~nonfinite.unsqueeze(-1)
        counts = mask.sum(-1).to(torch.promote_types(student_log_probs.dtype, torch.float32))
        weights = compute_token_weights(counts, loss_agg_mode, horizon=mask.shape[-1])
        inputs = LossInputs(
            student_log_probs=student_log_probs[mask],
            old_log_probs=(student_log_probs if old_log_probs is None else old_log_probs)[mask].detach(),
            rollout_is_weights=None if rollout_is_weights is None else rollout_is_weights[mask].detach(),
            distilled=torch.ones_like(student_log_probs[mask], dtype=torch.bool),
            distillation_weights=weights.unsqueeze(-1).expand(mask.shape)[mask],
            teacher_log_probs=teacher_log_probs[mask].detach(),
            student_distribution=None if student_distribution is None else student_distribution[mask],
            teacher_distribution=None if teacher_distribution is None else teacher_distribution[mask].detach(),
        )
        losses, flops_per_token = compute_distillation_token_losses(inputs, config)
        broken = torch.zeros_like(mask).masked_scatter(mask, ~torch.isfinite(losses))
        if not bool(broken.any()):
            break
    # The sum over zero tokens keeps the graph, so that backward works on an empty batch.
    assert inputs.distillation_weights is not None
    loss = (losses * inputs.distillation_weights).sum() + 0.0 * student_log_probs[mask].sum()
    values = {
        name: float(total / count.clamp(min=1)) for name, (total, count) in reduce_values(flops_per_token).items()
    }
    values |= {metrics.DISTILLATION_LOSS: float(loss.detach()), metrics.NONFINITE_SAMPLES: float(num_dropped)}
    return loss, values


def _find_nonfinite_tokens(
    mask: Tensor, token_values: Sequence[Tensor | None], distributions: Sequence[Tensor | None]
) -> Tensor:
    """Mask [B, T] of tokens with a non-finite value; ``-inf`` in a distribution is valid (probability 0)."""
    broken = torch.zeros_like(mask)
    for values in token_values:
        if values is not None:
            broken = broken | ~torch.isfinite(values.detach())
    for log_probs in distributions:
        if log_probs is not None:
            broken = broken | ~(log_probs.detach().amax(-1) < torch.inf)  # amax propagates NaN
    return broken


def _require_tensors(config: SelfDistillationConfig, given: Mapping[str, object]) -> None:
    needed: list[str] = []
    if config.full_logit_distillation:
        kept = "topk" if config.distillation_topk is not None else "all"
        needed = [f"student_{kept}_log_probs", f"teacher_{kept}_log_probs"]
    if config.is_clip is not None:
        needed.append("old_log_probs")
    for name in needed:
        if given[name] is None:
            raise ValueError(
                f"{name} is required by these settings (full_logit_distillation, distillation_topk, is_clip)"
            )


def add_sums(sums: Sums, more: Sums) -> None:
    """Add the sums of another micro-batch in place."""
    for name, (total, count) in more.items():
        before = sums.get(name)
        sums[name] = (total, count) if before is None else (before[0] + total, before[1] + count)


def mean_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and count of a metric's values."""
    values = values.detach()
    return values.sum(), torch.full((), values.numel(), device=values.device)


def reduce_values(values: TokenValues) -> Sums:
    """Sums and counts of the metrics."""
    return {name: _total(each) if name in TOTALS else mean_of(each) for name, each in values.items()}


def _total(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.detach().sum(), torch.zeros((), dtype=torch.long, device=values.device)
