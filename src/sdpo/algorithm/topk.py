"""The entries of the vocabulary that are compared with ``distillation_topk``: the student's most likely."""

from __future__ import annotations

from torch import Tensor


def topk_support(log_probs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the k largest entries of distributions [N, V], largest first: [N, k] each."""
    return log_probs.topk(k, dim=-1)
