"""``sdpo.algorithm.topk`` without a search of the whole vocabulary: faster on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

# Entries per group in the top-k search: a trade-off between the number of groups and the candidates in k groups.
TOP_GROUP = 64


def topk_support(log_probs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the k largest entries of distributions [N, V], largest first: [N, k] each."""
    vocab_size = log_probs.shape[-1]
    width = vocab_size // TOP_GROUP
    if width <= k:
        return log_probs.topk(k, dim=-1)
    # The k largest entries are in the k groups with the largest maxima, or in the remainder that fills no group.
    # Group g holds the entries g, g + width, g + 2 width ...
    with torch.no_grad():
        largest = log_probs[:, : width * TOP_GROUP].unflatten(-1, (TOP_GROUP, width)).amax(1)
        groups = largest.topk(k, dim=-1, sorted=False).indices
        offsets = torch.arange(0, width * TOP_GROUP, width, device=log_probs.device)
        rest = torch.arange(width * TOP_GROUP, vocab_size, device=log_probs.device).expand(len(log_probs), -1)
        candidates = torch.cat([(groups[:, :, None] + offsets).flatten(1), rest], dim=-1)
        chosen = log_probs.gather(-1, candidates).topk(k, dim=-1).indices
        ids = candidates.gather(-1, chosen)
    return log_probs.gather(-1, ids), ids
