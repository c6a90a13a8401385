"""Divergences of a block of distilled tokens, prepared for the gradient by the student's logits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdpo.algorithm.distributions import TokenDistributions
from sdpo.algorithm.topk import complete_topk
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.kernels.cpu.grouped_topk import topk_support
from sdpo.kernels.divergence_grad import compute_divergence, compute_entropy, differentiate_divergence


@dataclass(frozen=True)
class Comparison:
    """The leaf at which autograd stops, and the derivative from there to the student's log-probabilities.

    For complete distributions the leaf is the divergence [m], with its derivative [m, V]. With top-k it is the kept
    log-probabilities [m, K], which need no derivative.
    """

    leaf: Tensor
    derivative: Tensor | None = None  # [m, V]
    topk_ids: Tensor | None = None  # [m, K]


def compare(
    tokens: TokenDistributions,
    student: Tensor,
    student_probs: Tensor,
    teacher: Tensor,
    teacher_probs: Tensor,
    config: SelfDistillationConfig,
) -> tuple[TokenDistributions, Comparison]:
    """Add the divergence and the entropies of the compared distributions to ``tokens``.

    Args:
        student, teacher: [m, V] log-probabilities; overwritten if complete distributions are compared.
        student_probs, teacher_probs: [m, V].
    """
    if config.distillation_topk is None:
        value, derivative = differentiate_divergence(
            student, teacher, config.alpha, student=student_probs, teacher=teacher_probs, overwrite=True
        )
        value.requires_grad_()
        tokens = replace(tokens, divergence=value, compared_teacher_entropies=tokens.teacher_entropies)
        return tokens, Comparison(value, derivative=derivative)
    kept, topk_ids = topk_support(student, config.distillation_topk)
    divergence, entropies = compare_topk(kept.requires_grad_(), teacher.gather(-1, topk_ids), config)
    tokens = replace(tokens, divergence=divergence, compared_teacher_entropies=entropies)
    return tokens, Comparison(kept, topk_ids=topk_ids)


def compare_topk(student: Tensor, teacher: Tensor, config: SelfDistillationConfig) -> tuple[Tensor, Tensor | None]:
    """Divergence [m] from the kept entries [m, K], with gradient; the teacher's entropies [m] if the loss reads them.

    Both are of the distributions that ``complete_topk`` makes of the kept entries.
    """
    with torch.enable_grad():
        teacher = complete_topk(teacher.detach(), config)
        divergence = compute_divergence(complete_topk(student, config), teacher, config.alpha)
    return divergence, compute_entropy(teacher) if config.teacher_entropy_beta else None
