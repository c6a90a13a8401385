"""Divergence of the student's and the teacher's next-token distributions, one number per token.

Sign convention of the official code and TRL: ``alpha=0`` is the forward KL(teacher || student), ``alpha=1`` the reverse
KL(student || teacher), and between them the generalised Jensen-Shannon divergence

    (1 - alpha) KL(student || m) + alpha KL(teacher || m),   m = (1 - alpha) student + alpha teacher.

The interpolation tends to 0 for alpha -> 0 and 1, so both end points are defined as KLs instead of limits.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

# Upper bound of log(sum p) for the tail log(1 - sum p), as in the official code.
TAIL_LOG_SUM_MAX = -1e-7
# Replaces log 0, because -inf minus -inf is NaN; exp() of it is 0.
LOG_ZERO = -1e4


def compute_kl(p_log_probs: Float[Tensor, "*axes C"], q_log_probs: Float[Tensor, "*axes C"]) -> Float[Tensor, "*axes"]:
    """KL(p || q) of distributions; gradients reach both.

    An entry with p = 0 (log-probability ``-inf``) contributes 0 and no gradient for every q; an entry with q = 0 and
    p > 0 makes the divergence infinite.
    """
    log_ratio = (p_log_probs - q_log_probs).masked_fill(torch.isneginf(p_log_probs), 0.0)
    return (p_log_probs.exp() * log_ratio).sum(-1)


def compute_divergence(
    student_log_probs: Float[Tensor, "*axes C"], teacher_log_probs: Float[Tensor, "*axes C"], alpha: float
) -> Float[Tensor, "*axes"]:
    """Divergence for ``alpha`` of distributions: complete, or of kept entries with a tail or renormalised.

    Both get gradients. Range of a Jensen-Shannon divergence: [0, H(alpha)] with H the binary entropy, so at most log 2
    (at alpha = 0.5).

    Source: SDPO (arXiv 2601.20802), section 3 and appendix; official function ``compute_self_distillation_loss``.

    Raises:
        ValueError: ``alpha`` is not in [0, 1].
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1], got {alpha!r}")
    if alpha == 0.0:
        return compute_kl(teacher_log_probs, student_log_probs)
    if alpha == 1.0:
        return compute_kl(student_log_probs, teacher_log_probs)
    student, teacher = student_log_probs.clamp(min=LOG_ZERO), teacher_log_probs.clamp(min=LOG_ZERO)
    mixture = torch.logaddexp(student + math.log1p(-alpha), teacher + math.log(alpha))
    return (1.0 - alpha) * compute_kl(student, mixture) + alpha * compute_kl(teacher, mixture)


def add_tail(topk_log_probs: Float[Tensor, "*axes K"]) -> Float[Tensor, "*axes K+1"]:
    """Append a bucket with the remaining mass, log(1 - sum p)."""
    log_sum = torch.logsumexp(topk_log_probs, dim=-1, keepdim=True).clamp(max=TAIL_LOG_SUM_MAX)
    return torch.cat([topk_log_probs, torch.log(-torch.expm1(log_sum))], dim=-1)


def renormalize(topk_log_probs: Float[Tensor, "*axes K"]) -> Float[Tensor, "*axes K"]:
    """Normalise the kept entries to a distribution."""
    return topk_log_probs - torch.logsumexp(topk_log_probs, dim=-1, keepdim=True)


def compute_sampled_token_surrogate(
    student_log_probs: Float[Tensor, "*axes"], teacher_log_probs: Float[Tensor, "*axes"]
) -> Float[Tensor, "*axes"]:
    """Loss from the sampled token's log-probabilities, with the reverse KL's gradient in expectation.

    stopgrad(log student - log teacher) * log student: the score-function form (Prop. 2.1 for the sampled entry). Its
    *value* is not a divergence and may be negative.
    """
    return (student_log_probs - teacher_log_probs).detach() * student_log_probs


def compute_entropy(log_probs: Float[Tensor, "*axes C"]) -> Float[Tensor, "*axes"]:
    """Entropy in nats of distributions; an entry of probability 0 contributes 0."""
    return -(log_probs.exp() * log_probs.clamp(min=LOG_ZERO)).sum(-1)
