"""The entries of the vocabulary that are compared with ``distillation_topk``: the student's most likely."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from sdpo.algorithm.divergence import add_tail, renormalize
from sdpo.config.self_distillation import SelfDistillationConfig


def topk_support(log_probs: Float[Tensor, "M V"], k: int) -> tuple[Float[Tensor, "M K"], Int[Tensor, "M K"]]:
    """Values and indices of the k largest entries of distributions, largest first."""
    return log_probs.topk(k, dim=-1)


def complete_topk(topk_log_probs: Float[Tensor, "M K"], config: SelfDistillationConfig) -> Float[Tensor, "M C"]:
    """A distribution from the kept entries: with a tail entry, or renormalised."""
    return add_tail(topk_log_probs) if config.distillation_add_tail else renormalize(topk_log_probs)
