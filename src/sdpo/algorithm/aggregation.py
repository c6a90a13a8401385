"""Weights of tokens and samples in the aggregated loss, and the schedule of the distillation coefficient."""

from __future__ import annotations

import torch
from jaxtyping import Float, Real
from torch import Tensor

from sdpo.config.self_distillation import SelfDistillationConfig


def compute_token_weights(
    num_tokens: Real[Tensor, "B"], loss_agg_mode: str, horizon: int | None = None
) -> Float[Tensor, "B"]:
    """Weight of a token of each sample in the aggregated loss.

    Args:
        num_tokens: counted tokens of each sample; samples with 0 are left out of the mean over sequences.
        loss_agg_mode: ``token-mean`` 1 / all tokens; ``seq-mean-token-sum`` 1 / sequences; ``seq-mean-token-mean``
            1 / (sequences * the sample's tokens); ``seq-mean-token-sum-norm`` 1 / (sequences * horizon).
        horizon: constant of ``seq-mean-token-sum-norm``, in tokens; ignored by the other modes.

    Returns:
        At least float32.

    Raises:
        ValueError: unknown mode, or a missing horizon.

    Source: verl ``agg_loss``. ``token-mean`` counts distilled tokens, as the official code does.
    """
    counts = num_tokens.to(torch.float64 if num_tokens.dtype == torch.float64 else torch.float32)
    present = (counts > 0).to(counts.dtype)
    num_sequences = present.sum().clamp(min=1)
    if loss_agg_mode == "token-mean":
        return present / counts.sum().clamp(min=1)
    if loss_agg_mode == "seq-mean-token-sum":
        return present / num_sequences
    if loss_agg_mode == "seq-mean-token-mean":
        return present / (num_sequences * counts.clamp(min=1))
    if loss_agg_mode == "seq-mean-token-sum-norm":
        if horizon is None:
            raise ValueError("loss_agg_mode seq-mean-token-sum-norm needs a horizon")
        return present / (num_sequences * horizon)
    raise ValueError(f"unknown loss_agg_mode {loss_agg_mode!r}")


def compute_distillation_coef(config: SelfDistillationConfig, step: int, max_steps: int) -> float:
    """Weight of the distillation loss at step 1 ... max_steps: linear from start to end."""
    progress = 0.0 if max_steps <= 1 else (step - 1) / (max_steps - 1)
    return config.distillation_coef_start + progress * (config.distillation_coef_end - config.distillation_coef_start)


def compute_prompt_weights(success_rates: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    """sqrt(p (1 - p)) of each sample's prompt, in [0, 0.5]; 0 if all rollouts succeed or all fail."""
    return (success_rates * (1.0 - success_rates)).clamp(min=0).sqrt()
