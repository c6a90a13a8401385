"""The public form of the loss from hidden states."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sdpo import metrics
from sdpo.algorithm.fused import TokenInputs
from sdpo.algorithm.logits import LazyLogits, softmax_type
from sdpo.algorithm.loss import compute_token_weights
from sdpo.config import SelfDistillationConfig
from sdpo.kernels.dispatch import compute_fused_loss


def fused_self_distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    sampled_ids: Tensor,
    loss_mask: Tensor,
    self_distillation_config: SelfDistillationConfig,
    *,
    old_log_probs: Tensor | None = None,
    rollout_is_weights: Tensor | None = None,
    advantages: Tensor | None = None,
    self_distillation_mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """``compute_self_distillation_loss`` from hidden states, averaged over the counted tokens (``token-mean``).

    Its memory does not grow with N times V; loss and gradients are the same, computed in one pass.

    Args:
        student_hidden: [N, H], what the student's head reads at the positions that predict the sampled tokens.
        student_head: [V, H], the head's weight. Gradients reach both, and ``student_bias``.
        teacher_hidden: [N, H'], the teacher's for the same tokens; read at distilled tokens.
        teacher_head: [V, H'], be it the student's very tensor; the teacher never receives a gradient.
        sampled_ids: [N], the tokens that were sampled.
        loss_mask: [N], 1 at tokens that count. What stands at others never matters.
        self_distillation_config: which divergence, which level, which clips.
        old_log_probs: [N], needed unless ``is_clip`` is None.
        rollout_is_weights: [N], truncated importance weights old policy / sampler.
        advantages: [N]. If given, the loss is grpo_coef * GRPO + (1 - grpo_coef) * distillation; if not, it is the
            distillation part alone, whatever ``grpo_coef``.
        self_distillation_mask: [N], 1 at tokens that are distilled; by default all that count.
        temperature: of the sampler, > 0; both sides' logits are divided by it.
        softcap: logits -> softcap * tanh(logits / softcap) on both sides, > 0.
        student_bias, teacher_bias: [V], the heads' biases.
        chunk_size: tokens at a time, >= 1; by default ``choose_chunk_size``.

    Returns:
        The scalar loss and its metrics, those of distilled tokens only if there are any. No counted token at all gives
        a loss of exactly 0 with a zero gradient.

    Raises:
        ValueError: ``old_log_probs`` is missing where the settings need it.

    A token with a number that is not finite is left out as if it were not there, and counted in
    ``self_distillation/nonfinite_samples``: here every token is a sample of its own.
    """
    config = self_distillation_config
    if advantages is None:
        config = replace(config, grpo_coef=0.0)
    if config.is_clip is not None and old_log_probs is None:
        raise ValueError("old_log_probs is needed by these settings (is_clip)")
    counted = loss_mask.bool()
    distilled = counted if self_distillation_mask is None else counted & self_distillation_mask.bool()
    if advantages is None:
        counted = distilled
    num_counted = int(counted.sum())
    for given in (old_log_probs, rollout_is_weights, advantages):
        if given is not None:
            counted = counted & torch.isfinite(given)
    while True:
        distilled = distilled & counted
        outputs = compute_fused_loss(
            LazyLogits(student_hidden[counted], student_head, student_bias, softcap),
            [LazyLogits(teacher_hidden[distilled], teacher_head, teacher_bias, softcap)],
            TokenInputs(
                sampled_ids=sampled_ids[counted],
                old_log_probs=None if old_log_probs is None else old_log_probs[counted].detach(),
                policy_weights=_average(counted, student_hidden)[counted],
                advantages=None if advantages is None else advantages[counted],
                rollout_is_weights=None if rollout_is_weights is None else rollout_is_weights[counted].detach(),
                distilled=distilled[counted],
                distillation_weights=_average(distilled, student_hidden)[counted],
            ),
            config,
            temperature=temperature,
            chunk_size=chunk_size,
        )
        finite = torch.isfinite(outputs.token_losses)
        finite[distilled[counted]] &= torch.isfinite(outputs.teacher_log_probs)
        if bool(finite.all()):
            break
        counted = counted.masked_scatter(counted, finite)
    values = {name: float(total / count.clamp(min=1)) for name, (total, count) in outputs.sums.items()}
    num_dropped = num_counted - int(counted.sum())
    return outputs.loss, values | {metrics.NONFINITE_SAMPLES: float(num_dropped)}


def _average(mask: Tensor, like: Tensor) -> Tensor:
    """What a token counts in the mean over the tokens of a mask, [N]."""
    count = mask.sum()[None].to(softmax_type(like.dtype))
    return compute_token_weights(count, "token-mean").expand(len(mask))
