"""Describe how a model computes logits from hidden states, so that the loss can compute them in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from sdpo.errors import ConfigError
from sdpo.kernels.chunked_log_probs import LinearHead
from sdpo.models.forward import get_transformer

PROBE_LENGTH = 4
# Added to the logit of a suppressed token: probability 0 in float32, but finite, because a divergence with -inf on both
# sides is NaN. With a soft-cap c a probability of exp(-c - the largest logit) is left, 1e-20 for Gemma's c = 30.
SUPPRESSED = -1e4


def build_linear_head(model: nn.Module, hidden: Tensor, coefficient: float = 1.0) -> LinearHead:
    """Build the output layer of a transformers model with its input: hidden states [N, H].

    Args:
        coefficient: of the logits in a policy that adds several models' logits.
    """
    transformer: Any = model
    head, config = transformer.get_output_embeddings(), transformer.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    return LinearHead(
        hidden if scale == 1.0 else hidden * scale,
        head.weight,
        getattr(head, "bias", None),
        getattr(config, "final_logit_softcapping", None),  # Gemma
        coefficient,
    )


def suppress_tokens(head: LinearHead, token_ids: Sequence[int]) -> LinearHead:
    """Set the probability of these tokens to 0, as a sampler with ``suppress_tokens`` does.

    Args:
        token_ids: may be empty.
    """
    if not token_ids:
        return head
    bias = _build_bias(tuple(token_ids), len(head.weight), head.hidden.device)
    return replace(head, bias=bias if head.bias is None else head.bias + bias)


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def _build_bias(token_ids: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """Bias [size] of suppressed tokens; kept, because every micro-batch needs the same and the ids are on the host."""
    bias = torch.zeros(size)
    bias[list(token_ids)] = SUPPRESSED
    return bias.to(device)


def compute_dense_logits(head: LinearHead) -> Tensor:
    """Compute all logits [N, V] at once; for few tokens."""
    logits = head.hidden @ head.weight.to(head.hidden.dtype).T
    if head.bias is not None:
        logits = logits + head.bias
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits * head.coefficient


@torch.no_grad()
def measure_logit_scale(model: nn.Module) -> float:
    """Measure a model's factor of hidden states that ``build_linear_head`` lacks: 1 for nearly all models.

    It compares the model's logits of a few tokens with those of ``build_linear_head``.

    Raises:
        ConfigError: the logits are not proportional, so the model computes them in an unsupported way.
    """
    transformer: Any = model
    device = next(model.parameters()).device
    if device.type == "meta":  # a model without weights, used for counting
        return 1.0
    token_ids = torch.arange(PROBE_LENGTH, device=device)[None]
    was_training = model.training
    model.eval()
    hidden = get_transformer(model)(input_ids=token_ids, use_cache=False).last_hidden_state[0]
    logits = transformer(input_ids=token_ids, use_cache=False).logits[0].float()
    model.train(was_training)
    plain = compute_dense_logits(build_linear_head(model, hidden)).float()
    scale = float((logits * plain).sum() / plain.square().sum())
    tolerance = 1e-3 if hidden.dtype == torch.float32 else 0.05
    if abs(scale - 1.0) < tolerance:
        scale = 1.0
    difference = (compute_dense_logits(build_linear_head(model, hidden * scale)).float() - logits).abs().max()
    if not float(difference) <= tolerance * float(logits.abs().max()):
        raise ConfigError(
            f"model.path: {type(model).__name__} computes logits from hidden states in an unsupported way "
            f"(difference {float(difference):.2g})"
        )
    return scale
