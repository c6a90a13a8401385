"""Build the loss's inputs from the next-token distributions of student and teacher."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from sdpo.algorithm.divergence import compute_entropy
from sdpo.algorithm.importance_sampling import compute_ratio
from sdpo.algorithm.loss import LossInputs
from sdpo.algorithm.regularization import Regularization
from sdpo.algorithm.sums import Sums, mean_of
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.kernels.cpu.grouped_topk import topk_support
from sdpo.observability import metrics


def gather_log_probs(log_probs: Tensor, token_ids: Tensor) -> Tensor:
    """Entries of ``token_ids`` [N] in distributions [N, V], as [N]."""
    return log_probs.gather(-1, token_ids[:, None])[:, 0]


def build_policy_inputs(
    student_log_probs: Tensor,
    student_entropies: Tensor,
    *,
    old_log_probs: Tensor | None = None,
    policy_weights: Tensor | None = None,
    advantages: Tensor | None = None,
    rollout_is_weights: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    rollout_is_threshold: float = math.inf,
    distillation_coef: float = 1.0,
    ref_log_probs: Tensor | None = None,
    regularization: Regularization | None = None,
) -> LossInputs:
    """Inputs of ``compute_loss`` that need no teacher and no distributions.

    Args:
        student_log_probs: [N] of the sampled tokens, with gradient.
        student_entropies: [N] in nats, with gradient if ``regularization`` has an entropy term.
        (the others as in ``build_loss_inputs``)
    """
    old = student_log_probs.detach() if old_log_probs is None else old_log_probs
    if rollout_is_weights is None and rollout_log_probs is not None:
        rollout_is_weights = compute_ratio(old, rollout_log_probs).clamp(max=rollout_is_threshold)
    return LossInputs(
        student_entropies=student_entropies,
        student_log_probs=student_log_probs,
        old_log_probs=old,
        policy_weights=policy_weights,
        advantages=advantages,
        rollout_is_weights=rollout_is_weights,
        distillation_coef=distillation_coef,
        ref_log_probs=ref_log_probs,
        regularization=regularization,
    )


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
    student_probs: Tensor | None = None,
    teacher_probs: Tensor | None = None,
    distillation_weights: Tensor | None = None,
    distillation_coef: float = 1.0,
    ref_log_probs: Tensor | None = None,
    regularization: Regularization | None = None,
) -> tuple[LossInputs, Sums]:
    """Inputs of ``compute_loss``, and the sums of the entropy metrics.

    Args:
        student: [N, V] log-probabilities, normalised, with gradient.
        sampled_ids: [N] the sampled tokens.
        old_log_probs: [N]; the student's if None: with one optimizer step, the student equals the old policy.
        policy_weights, advantages, rollout_is_weights: [N], as in ``LossInputs``.
        rollout_log_probs: [N], the sampler's. Used only if ``rollout_is_weights`` is None: the weights are then the
            ratios old policy / sampler by token, truncated at ``rollout_is_threshold``.
        distillation_weights: [N], read at distilled tokens only.
        distilled: [N] bool, M of them set.
        teacher: [M, V] log-probabilities, normalised; None if no token is distilled.
        student_probs, teacher_probs: exp of ``student`` and ``teacher``, if already computed.
        ref_log_probs: [N], the reference model's; needed if ``regularization`` has a KL term.
    """
    has_entropy_term = regularization is not None and regularization.entropy_coeff != 0.0
    entropies = compute_entropy(student if has_entropy_term else student.detach(), student_probs)
    sums: Sums = {metrics.ENTROPY: mean_of(entropies)}
    common = build_policy_inputs(
        gather_log_probs(student, sampled_ids),
        entropies,
        old_log_probs=old_log_probs,
        policy_weights=policy_weights,
        advantages=advantages,
        rollout_is_weights=rollout_is_weights,
        rollout_log_probs=rollout_log_probs,
        rollout_is_threshold=rollout_is_threshold,
        distillation_coef=distillation_coef,
        ref_log_probs=ref_log_probs,
        regularization=regularization,
    )
    if teacher is None:
        return common, sums
    assert distilled is not None and distillation_weights is not None
    teacher_entropy = compute_entropy(teacher, teacher_probs)
    sums[metrics.TEACHER_ENTROPY] = mean_of(teacher_entropy)
    teacher_log_probs = gather_log_probs(teacher, sampled_ids[distilled])
    student_rows = student if bool(distilled.all()) else student[distilled]
    topk_ids = None
    if config.distillation_topk is not None:
        student_rows, topk_ids = topk_support(student_rows, config.distillation_topk)
        teacher = teacher.gather(-1, topk_ids)
    inputs = replace(
        common,
        distilled=distilled,
        distillation_weights=distillation_weights[distilled],
        teacher_log_probs=teacher_log_probs,
        student_distribution=student_rows,
        teacher_distribution=teacher,
        topk_ids=topk_ids,
        teacher_entropy=None if config.distillation_topk is not None else teacher_entropy.detach(),
    )
    return inputs, sums
