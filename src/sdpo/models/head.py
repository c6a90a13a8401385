"""From a model's hidden states to its logits, without computing them: what the loss needs to do so in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sdpo.algorithm.logits import LazyLogits
from sdpo.errors import UserError

PROBE_LENGTH = 4
# Added to a logit: no probability in float32, and finite, since the divergence of two infinities is not a number. A
# soft-cap c leaves exp(-c - the largest logit) of it, 1e-20 for Gemma's 30.
FORBIDDEN = -1e4


def build_lazy_logits(model: nn.Module, hidden: Tensor, coefficient: float = 1.0) -> LazyLogits:
    """The logits that a model of transformers would make of hidden states [N, H], not computed yet.

    Args:
        coefficient: with which they are added up in a policy of several models.
    """
    transformer: Any = model
    head, config = transformer.get_output_embeddings(), transformer.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    return LazyLogits(
        hidden if scale == 1.0 else hidden * scale,
        head.weight,
        getattr(head, "bias", None),
        getattr(config, "final_logit_softcapping", None),  # Gemma
        coefficient,
    )


def forbid_tokens(lazy: LazyLogits, token_ids: Sequence[int]) -> LazyLogits:
    """The same logits with no probability for some tokens, as a sampler has them that never draws these.

    Args:
        token_ids: of the vocabulary; without any, nothing changes.
    """
    if not token_ids:
        return lazy
    bias = torch.zeros(len(lazy.weight), device=lazy.hidden.device)
    bias[list(token_ids)] = FORBIDDEN
    return replace(lazy, bias=bias if lazy.bias is None else lazy.bias + bias)


def compute_dense_logits(lazy: LazyLogits) -> Tensor:
    """Those logits [N, V], all of them: for few tokens."""
    logits = lazy.hidden @ lazy.weight.to(lazy.hidden.dtype).T
    if lazy.bias is not None:
        logits = logits + lazy.bias
    if lazy.softcap is not None:
        logits = lazy.softcap * torch.tanh(logits / lazy.softcap)
    return logits * lazy.coefficient


@torch.no_grad()
def measure_logit_scale(model: nn.Module) -> float:
    """By what a model multiplies its hidden states, beyond what ``build_lazy_logits`` knows: 1 for nearly all models.

    A few tokens are read, and the model's logits of them compared with those of its output layer.

    Raises:
        UserError: they are not proportional, so this model makes logits in a way that is not known here.
    """
    transformer: Any = model
    device = next(model.parameters()).device
    if device.type == "meta":  # a model to count with: nothing can be computed
        return 1.0
    token_ids = torch.arange(PROBE_LENGTH, device=device)[None]
    was_training = model.training
    model.eval()
    hidden = transformer.base_model(input_ids=token_ids, use_cache=False).last_hidden_state[0]
    logits = transformer(input_ids=token_ids, use_cache=False).logits[0].float()
    model.train(was_training)
    plain = compute_dense_logits(build_lazy_logits(model, hidden)).float()
    scale = float((logits * plain).sum() / plain.square().sum())
    tolerance = 1e-3 if hidden.dtype == torch.float32 else 0.05
    if abs(scale - 1.0) < tolerance:
        scale = 1.0
    difference = (compute_dense_logits(build_lazy_logits(model, hidden * scale)).float() - logits).abs().max()
    if not float(difference) <= tolerance * float(logits.abs().max()):
        raise UserError(
            f"model.path: {type(model).__name__} makes logits of its hidden states in a way that is not supported "
            f"(off by {float(difference):.2g})"
        )
    return scale
