"""From next-token distributions to the values that the loss reads of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxtyping import Float, Int
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

    student_log_probs: Float[Tensor, "N"]  # of the sampled tokens
    student_entropies: Float[Tensor, "N"] | None = None  # in nats; with gradient if the loss has an entropy term
    teacher_log_probs: Float[Tensor, "M"] | None = None  # None: no token is distilled
    teacher_entropies: Float[Tensor, "M"] | None = None  # of complete distributions
    student_distribution: Float[Tensor, "M C"] | None = None  # log-probabilities: all, or the student's top k
    teacher_distribution: Float[Tensor, "M C"] | None = None  # of the same entries
    divergence: Float[Tensor, "M"] | None = None  # if already computed
    compared_teacher_entropies: Float[Tensor, "M"] | None = None  # of what the divergence compares, if computed


def gather_log_probs(log_probs: Float[Tensor, "N V"], token_ids: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Entries of ``token_ids`` in distributions."""
    return log_probs.gather(-1, token_ids[:, None])[:, 0]


def read_distributions(
    student: Float[Tensor, "N V"],
    teacher: Float[Tensor, "M V"] | None,
    batch: TokenBatch,
    config: SelfDistillationConfig,
) -> TokenDistributions:
    """The loss's values from complete distributions.

    Args:
        student: log-probabilities, normalised, with gradient.
        teacher: log-probabilities, normalised; None if no token is distilled.
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
