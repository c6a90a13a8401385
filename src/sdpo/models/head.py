"""From a model's hidden states to its logits, without computing them: what the loss needs to do so in chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sdpo.algorithm.fused import LazyLogits
from sdpo.errors import UserError

PROBE_LENGTH = 4


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


def compute_dense_logits(lazy: LazyLogits) -> Tensor:
    """Those logits [N, V], all of them: for few tokens."""
    logits = lazy.hidden @ lazy.weight.to(lazy.hidden.dtype).T
    if lazy.bias is not None:
        logits = logits + lazy.bias
    if lazy.softcap is not None:
        logits = lazy.softcap * torch.tanh(logits / lazy.softcap)
    return logits * lazy.coefficient


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compare the logits of a few tokens with the model's own.

    Raises:
        UserError: this model makes logits in a way that is not known here.
    """
    transformer: Any = model
    device = next(model.parameters()).device
    token_ids = torch.arange(PROBE_LENGTH, device=device)[None]
    was_training = model.training
    model.eval()
    hidden = transformer.base_model(input_ids=token_ids, use_cache=False).last_hidden_state
    logits = transformer(input_ids=token_ids, use_cache=False).logits
    model.train(was_training)
    difference = (compute_dense_logits(build_lazy_logits(model, hidden[0])) - logits[0]).abs().max()
    if float(difference) > (1e-3 if logits.dtype == torch.float32 else 0.05) * float(logits.abs().max()):
        raise UserError(
            f"model.path: {type(model).__name__} makes logits of its hidden states in a way that is not supported "
            f"(off by {float(difference):.2g})"
        )
