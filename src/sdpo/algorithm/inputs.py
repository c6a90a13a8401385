"""From next-token distributions of student and teacher to what the loss reads."""

from __future__ import annotations

import math

from torch import Tensor

from sdpo import metrics
from sdpo.algorithm.correction import compute_ratio
from sdpo.algorithm.divergence import compute_entropy
from sdpo.algorithm.loss import LossInputs, Sums, mean_of
from sdpo.config import SelfDistillationConfig


def gather_log_probs(log_probs: Tensor, token_ids: Tensor) -> Tensor:
    """The entries of ``token_ids`` [N] in distributions [N, V], giving [N]."""
    return log_probs.gather(-1, token_ids[:, None])[:, 0]


def build_loss_inputs(
    student: Tensor,
    sampled_ids: Tensor,
    config: SelfDistillationConfig,
    *,
    old_log_probs: Tensor | None = None,
    policy_weights: Tensor | None = None,
    advantages: Tensor | None = None,
    rollout_is_weights: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    rollout_is_threshold: float = math.inf,
    distilled: Tensor | None = None,
    teacher: Tensor | None = None,
    distillation_weights: Tensor | None = None,
    distillation_coef: float = 1.0,
) -> tuple[LossInputs, Sums]:
    """Inputs of ``compute_loss``, and the sums for the entropies' metrics.

    Args:
        student: [N, V] log-probabilities, normalised, with gradient.
        sampled_ids: [N] the tokens that were sampled.
        old_log_probs: [N]; the student's own, if not given: with one optimizer step it still is the old policy.
        policy_weights, advantages, rollout_is_weights: [N], as in ``LossInputs``.
        rollout_log_probs: [N], the sampler's. If given, and no ``rollout_is_weights`` are, those are the ratios old
            policy / sampler by token, at most ``rollout_is_threshold``: so they may depend on log-probabilities that
            are known here only.
        distillation_weights: [N], of which only those of distilled tokens are read.
        distilled: [N] bool, M of them set.
        teacher: [M, V] log-probabilities, normalised; None where nothing is distilled.
    """
    student_log_probs = gather_log_probs(student, sampled_ids)
    old = student_log_probs.detach() if old_log_probs is None else old_log_probs
    if rollout_is_weights is None and rollout_log_probs is not None:
        rollout_is_weights = compute_ratio(old, rollout_log_probs).clamp(max=rollout_is_threshold)
    sums: Sums = {metrics.ENTROPY: mean_of(compute_entropy(student.detach()))}
    common = {
        "student_log_probs": student_log_probs,
        "old_log_probs": old,
        "policy_weights": policy_weights,
        "advantages": advantages,
        "rollout_is_weights": rollout_is_weights,
        "distillation_coef": distillation_coef,
    }
    if teacher is None:
        return LossInputs(**common), sums  # type: ignore[arg-type]
    assert distilled is not None and distillation_weights is not None
    sums[metrics.TEACHER_ENTROPY] = mean_of(compute_entropy(teacher))
    teacher_log_probs = gather_log_probs(teacher, sampled_ids[distilled])
    student_rows = student if bool(distilled.all()) else student[distilled]
    kept_ids = None
    if config.distillation_topk is not None:
        student_rows, kept_ids = student_rows.topk(config.distillation_topk, dim=-1)
        teacher = teacher.gather(-1, kept_ids)
    inputs = LossInputs(
        **common,  # type: ignore[arg-type]
        distilled=distilled,
        distillation_weights=distillation_weights[distilled],
        teacher_log_probs=teacher_log_probs,
        student_distribution=student_rows,
        teacher_distribution=teacher,
        kept_ids=kept_ids,
    )
    return inputs, sums
