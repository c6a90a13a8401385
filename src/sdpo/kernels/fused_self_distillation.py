"""Public function for the loss from hidden states."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from sdpo.algorithm.aggregation import compute_token_weights
from sdpo.algorithm.batch import TokenBatch
from sdpo.algorithm.regularization import Regularization
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.kernels.chunked_log_probs import LinearHead, softmax_type
from sdpo.kernels.dispatch import fused_linear_sdpo_loss
from sdpo.observability import metrics


def fused_self_distillation_loss(
    student_hidden: Float[Tensor, "N H"],
    student_head: Float[Tensor, "V H"],
    teacher_hidden: Float[Tensor, "N H_teacher"],
    teacher_head: Float[Tensor, "V H_teacher"],
    sampled_ids: Int[Tensor, "N"],
    loss_mask: Shaped[Tensor, "N"],
    self_distillation_config: SelfDistillationConfig,
    *,
    old_log_probs: Float[Tensor, "N"] | None = None,
    rollout_is_weights: Float[Tensor, "N"] | None = None,
    advantages: Float[Tensor, "N"] | None = None,
    self_distillation_mask: Shaped[Tensor, "N"] | None = None,
    ref_log_probs: Float[Tensor, "N"] | None = None,
    kl_loss_coef: float = 0.0,
    kl_loss_type: str = "low_var_kl",
    entropy_coeff: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    student_bias: Float[Tensor, "V"] | None = None,
    teacher_bias: Float[Tensor, "V"] | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """``compute_self_distillation_loss`` from hidden states, averaged over the counted tokens (``token-mean``).

    Memory does not grow with N times V. Loss and gradients are equal up to rounding, computed in one pass.

    Args:
        student_hidden: inputs of the student's head at the positions that predict the sampled tokens.
        student_head: the head's weight. Both get gradients, as does ``student_bias``.
        teacher_hidden: inputs of the teacher's head for the same tokens; read at distilled tokens.
        teacher_head: may be ``student_head``; the teacher never receives a gradient.
        sampled_ids: the sampled tokens.
        loss_mask: 1 at tokens that count. Values at other tokens are ignored.
        self_distillation_config: divergence, level and clips.
        old_log_probs: required unless ``is_clip`` is None.
        rollout_is_weights: truncated importance weights old policy / sampler.
        advantages: with advantages the loss is w * GRPO + (1 - w) * distillation, w = ``policy_loss_weight``;
            without, it is the distillation loss and ``policy_loss_weight`` is ignored.
        self_distillation_mask: 1 at distilled tokens; by default all counted tokens.
        ref_log_probs: the reference model's, at the same temperature; required if ``kl_loss_coef`` > 0.
        kl_loss_coef, kl_loss_type: weight >= 0 of KL(student || reference) over all counted tokens, which is added, and
            its estimator (``sdpo.algorithm.regularization.estimate_kl``).
        entropy_coeff: weight >= 0 of the student's entropy over all counted tokens, which is subtracted.
        temperature: of the sampler, > 0; divides the logits of student and teacher.
        softcap: logits -> softcap * tanh(logits / softcap) for student and teacher, > 0.
        student_bias, teacher_bias: the heads' biases.
        chunk_size: tokens per chunk, >= 1; by default ``choose_chunk_size``.

    Returns:
        The loss and its metrics; distillation metrics are missing if no token is distilled. Without counted
        tokens the loss is exactly 0, with a zero gradient.

    Raises:
        ValueError: ``old_log_probs`` is None, but ``is_clip`` requires it; or ``ref_log_probs`` is None, but
            ``kl_loss_coef`` requires it.

    Tokens with a non-finite value are left out and counted in ``self_distillation/nonfinite_samples``; this function
    treats each token as a sample.
    """
    config = self_distillation_config
    if advantages is None:
        config = replace(config, policy_loss_weight=0.0)
    if config.is_clip is not None and old_log_probs is None:
        raise ValueError("old_log_probs is required by these settings (is_clip)")
    regularization = None
    if kl_loss_coef or entropy_coeff:
        regularization = Regularization(kl_loss_coef or None, kl_loss_type, entropy_coeff)
    if not kl_loss_coef:
        ref_log_probs = None
    elif ref_log_probs is None:
        raise ValueError(f"ref_log_probs is required by kl_loss_coef={kl_loss_coef:g}")
    counted = loss_mask.bool()
    distilled = counted if self_distillation_mask is None else counted & self_distillation_mask.bool()
    if advantages is None and regularization is None:
        counted = distilled
    num_counted = counted.sum()
    for given in (old_log_probs, rollout_is_weights, advantages, ref_log_probs):
        if given is not None:
            counted = counted & torch.isfinite(given)
    while True:
        distilled = distilled & counted
        rows, shown = _find(counted), _find(distilled)
        outputs = fused_linear_sdpo_loss(
            LinearHead(_take(student_hidden, rows), student_head, student_bias, softcap),
            [LinearHead(_take(teacher_hidden, shown), teacher_head, teacher_bias, softcap)],
            TokenBatch(
                sampled_ids=_take(sampled_ids, rows),
                old_log_probs=None if old_log_probs is None else _take(old_log_probs, rows).detach(),
                policy_weights=_average(counted, student_hidden).expand(len(rows)),
                advantages=None if advantages is None else _take(advantages, rows),
                rollout_is_weights=None if rollout_is_weights is None else _take(rollout_is_weights, rows).detach(),
                distilled=_take(distilled, rows),
                distillation_weights=_average(distilled, student_hidden).expand(len(rows)),
                ref_log_probs=None if ref_log_probs is None else _take(ref_log_probs, rows),
                regularization=regularization,
            ),
            config,
            temperature=temperature,
            chunk_size=chunk_size,
        )
        finite = torch.ones_like(counted)
        finite[rows] = torch.isfinite(outputs.token_losses)
        finite[shown] = finite[shown] & torch.isfinite(outputs.teacher_log_probs)
        checks = [(num_counted - counted.sum()).to(outputs.loss), finite.all().to(outputs.loss)]
        counted = counted & finite
        # A single transfer from the device.
        means = [total / count.clamp(min=1) for total, count in outputs.sums.values()]
        *read, dropped, all_finite = torch.stack([*means, *checks]).tolist()
        if all_finite:
            values = metrics.name_loss_sums(dict(zip(outputs.sums, read, strict=True)))
            return outputs.loss, values | {metrics.NONFINITE_SAMPLES: dropped}


def _find(mask: Tensor) -> Tensor:
    """Indices at which a mask [N] is set."""
    return mask.nonzero()[:, 0]


def _take(values: Tensor, rows: Tensor) -> Tensor:
    """Select rows; returns the tensor itself, without a copy, if all rows are selected."""
    return values if len(rows) == len(values) else values[rows]


def _average(mask: Tensor, like: Tensor) -> Tensor:
    """Weight of a token in the mean over a mask's tokens, [1]."""
    count = mask.sum()[None].to(softmax_type(like.dtype))
    return compute_token_weights(count, "token-mean")
