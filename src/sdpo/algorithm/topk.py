"""The entries of the vocabulary that are compared with ``distillation_topk``: the student's most likely."""

from __future__ import annotations

from torch import Tensor

from sdpo.algorithm.divergence import add_tail, renormalize
from sdpo.config.self_distillation import SelfDistillationConfig


def topk_support(log_probs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the k largest entries of distributions [N, V], largest first: [N, k] each."""
    return log_probs.topk(k, dim=-1)


def complete_topk(topk_log_probs: Tensor, config: SelfDistillationConfig) -> Tensor:
    """A distribution from the kept entries [M, K]: with a tail entry [M, K + 1], or renormalised [M, K]."""
    return add_tail(topk_log_probs) if config.distillation_add_tail else renormalize(topk_log_probs)
