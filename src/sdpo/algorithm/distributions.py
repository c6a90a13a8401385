"""From next-token distributions to the values that the loss reads of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from sdpo.algorithm.batch import TokenBatch
from sdpo.algorithm.divergence import compute_entropy
from sdpo.algorithm.topk import topk_support
from sdpo.config.self_distillation import SelfDistillationConfig


@dataclass(frozen=True)
class TokenDistributions:
    """Values of N packed tokens from the distributions of the student, and of the teacher at M distilled tokens.

    Only the student's tensors and the divergence receive gradients.
    """

    student_log_probs: Tensor  # [N] log-probabilities of the sampled tokens
    student_entropies: Tensor | None = None  # [N] in nats; with gradient if the loss has an entropy term
    teacher_log_probs: Tensor | None = None  # [M]; None: no token is distilled
    teacher_entropies: Tensor | None = None  # [M] of complete distributions
    student_distribution: Tensor | None = None  # [M, V] or [M, K] log-probabilities (K: the student's top k)
    teacher_distribution: Tensor | None = None  # [M, V] or [M, K], same entries
    divergence: Tensor | None = None  # [M], if already computed
    compared_teacher_entropies: Tensor | None = None  # [M] of what the divergence compares, if already computed


def gather_log_probs(log_probs: Tensor, token_ids: Tensor) -> Tensor:
    """Entries of ``token_ids`` [N] in distributions [N, V], as [N]."""
    return log_probs.gather(-1, token_ids[:, None])[:, 0]


def read_distributions(
    student: Tensor, teacher: Tensor | None, batch: TokenBatch, config: SelfDistillationConfig
) -> TokenDistributions:
    """The loss's values from complete distributions.

    Args:
        student: [N, V] log-probabilities, normalised, with gradient.
        teacher: [M, V] log-probabilities, normalised; None if no token is distilled.
    """
    assert batch.sampled_ids is not None
    tokens = TokenDistributions(
        student_log_probs=gather_log_probs(student, batch.sampled_ids),
        student_entropies=compute_entropy(student if batch.has_entropy_term else student.detach()),
    )
    if teacher is None:
        return tokens
    student_rows, compared = batch.at_distilled(student, len(teacher)), teacher
    if config.distillation_topk is not None:
        student_rows, topk_ids = topk_support(student_rows, config.distillation_topk)
        compared = teacher.gather(-1, topk_ids)
    return replace(
        tokens,
        teacher_log_probs=gather_log_probs(teacher, batch.at_distilled(batch.sampled_ids, len(teacher))),
        teacher_entropies=compute_entropy(teacher),
        student_distribution=student_rows,
        teacher_distribution=compared,
    )
