"""Samples of a mini-batch with NaN or infinite values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from sdpo.kernels.fused_linear_loss import FusedOutputs
from sdpo.verl_backend.worker.mini_batch import gather_objects
from sdpo.verl_backend.worker.packing import PackedTokens, pad_right


def find_finite_tokens(tokens: PackedTokens, outputs: FusedOutputs) -> Tensor:
    """Return for each of the N tokens whether all of its values are finite, without waiting for the device."""
    inputs = tokens.inputs
    finite = torch.isfinite(outputs.token_losses) & torch.isfinite(outputs.student_log_probs)
    for values in (inputs.old_log_probs, inputs.rollout_is_weights):
        if values is not None:
            finite &= torch.isfinite(values)
    if len(outputs.teacher_log_probs):
        finite[inputs.distilled] &= torch.isfinite(outputs.teacher_log_probs)
    return finite


def find_nonfinite_samples(
    checked: Sequence[tuple[Tensor, Tensor]], data: TensorDict, group: Any
) -> tuple[list[int], int] | None:
    """Return this rank's samples to drop, and how many all ranks drop.

    Args:
        checked: of each micro-batch the tokens' sample numbers, and whether the tokens are finite.
        data: this rank's part of the mini-batch.
        group: of the data-parallel ranks.

    Returns:
        None on every rank if no sample is to drop, or if a rank would have none left. In the second case the gradient
        is non-finite, and verl skips the update.
    """
    numbers, finite = (torch.cat(parts) for parts in zip(*checked, strict=True))
    nonfinite = numbers[~finite].unique().tolist()
    num_samples = int(pad_right(data["response_mask"]).bool().any(1).sum())
    ranks = gather_objects((len(nonfinite), num_samples), group)
    total = sum(number for number, _ in ranks)
    if not total or any(0 < number >= available for number, available in ranks):
        return None
    return nonfinite, total
