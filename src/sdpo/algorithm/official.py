"""The distillation loss of a padded batch, with the signature of the official function (lasgroup/SDPO)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from sdpo.algorithm.aggregation import compute_token_weights
from sdpo.algorithm.batch import TokenBatch
from sdpo.algorithm.distillation import compute_distillation_token_losses
from sdpo.algorithm.distributions import TokenDistributions
from sdpo.algorithm.sums import reduce_values
from sdpo.config.self_distillation import SelfDistillationConfig

# Names of the returned metrics, by the names of the sums.
METRIC_NAMES = {
    "divergence": "self_distillation/divergence",
    "teacher_gap": "self_distillation/teacher_student_logprob_diff/mean",
    "gap_positive_fraction": "self_distillation/teacher_student_logprob_diff/positive_frac",
    "gap_positive_part": "self_distillation/teacher_student_logprob_diff/positive_part",
    "gap_negative_part": "self_distillation/teacher_student_logprob_diff/negative_part",
    "is_ratio": "self_distillation/is_ratio_mean",
    "is_clip_fraction": "self_distillation/is_clip_fraction",
}


def compute_self_distillation_loss(
    student_log_probs: Float[Tensor, "B T"],
    teacher_log_probs: Float[Tensor, "B T"],
    response_mask: Shaped[Tensor, "B T"],
    self_distillation_config: SelfDistillationConfig,
    old_log_probs: Float[Tensor, "B T"] | None = None,
    student_all_log_probs: Float[Tensor, "B T V"] | None = None,
    teacher_all_log_probs: Float[Tensor, "B T V"] | None = None,
    student_topk_log_probs: Float[Tensor, "B T K"] | None = None,
    teacher_topk_log_probs: Float[Tensor, "B T K"] | None = None,
    self_distillation_mask: Shaped[Tensor, "B"] | None = None,
    loss_agg_mode: str = "token-mean",
    rollout_is_weights: Float[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """Distillation loss of a padded batch, with the signature of the official function (lasgroup/SDPO).

    Args:
        student_log_probs: of the sampled tokens, with gradient.
        teacher_log_probs: the teacher's for the same tokens; never receives a gradient.
        response_mask: 1 at response tokens.
        self_distillation_config: divergence, level and clips. ``policy_loss_weight`` is not applied: the result is the
            distillation loss alone.
        old_log_probs: required unless ``is_clip`` is None.
        student_all_log_probs, teacher_all_log_probs: for the full vocabulary.
        student_topk_log_probs, teacher_topk_log_probs: both at the student's top k, for top-k.
        self_distillation_mask: 1 for samples with teacher context.
        loss_agg_mode: see ``compute_token_weights``; the horizon of ``seq-mean-token-sum-norm`` is T.
        rollout_is_weights: truncated importance weights old policy / sampler.

    Returns:
        The loss and its metrics. Without distilled tokens the loss is exactly 0, with a zero gradient.

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
        batch = TokenBatch(
            old_log_probs=(student_log_probs if old_log_probs is None else old_log_probs)[mask].detach(),
            rollout_is_weights=None if rollout_is_weights is None else rollout_is_weights[mask].detach(),
        )
        tokens = TokenDistributions(
            student_log_probs=student_log_probs[mask],
            teacher_log_probs=teacher_log_probs[mask].detach(),
            student_distribution=None if student_distribution is None else student_distribution[mask],
            teacher_distribution=None if teacher_distribution is None else teacher_distribution[mask].detach(),
        )
        losses, values_by_token = compute_distillation_token_losses(batch, tokens, config)
        broken = torch.zeros_like(mask).masked_scatter(mask, ~torch.isfinite(losses))
        if not bool(broken.any()):
            break
    # The sum over zero tokens keeps the graph, so that backward works on an empty batch.
    loss = (losses * weights.unsqueeze(-1).expand(mask.shape)[mask]).sum() + 0.0 * student_log_probs[mask].sum()
    sums = reduce_values(values_by_token)
    values = {METRIC_NAMES[name]: float(total / count.clamp(min=1)) for name, (total, count) in sums.items()}
    values["self_distillation/loss"] = float(loss.detach())
    values["self_distillation/nonfinite_samples"] = float(num_dropped)
    return loss, values


def _find_nonfinite_tokens(
    mask: Bool[Tensor, "B T"],
    token_values: Sequence[Float[Tensor, "B T"] | None],
    distributions: Sequence[Float[Tensor, "B T C"] | None],
) -> Bool[Tensor, "B T"]:
    """Mask of tokens with a non-finite value; ``-inf`` in a distribution is valid (probability 0)."""
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
