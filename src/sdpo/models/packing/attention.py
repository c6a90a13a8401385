"""Attention over packed rows, registered as an attention implementation of transformers.

For rows that are not packed, such as in sampling with a cache, it calls transformers' SDPA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sdpo.models.packing.layout import AttentionCall, PackedLayout

NAME = "sdpa_packed"
# Replaces the mask of a packed row: transformers passes a mask of four axes through unchanged.
NO_MASK = torch.empty(1, 1, 0, 0)
# Arguments for features beyond causal attention, with the values that disable them.
UNSUPPORTED = {"sliding_window": None, "softcap": None, "s_aux": None, "position_bias": None}


class PackingUnsupportedError(Exception):
    """This model's attention cannot be computed over a packed row."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: PackedLayout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row [1, heads, L, head size], giving [1, L, heads, head size].

    Raises:
        PackingUnsupportedError: the layer needs more than causal attention, or the model did not pass the layout.
    """
    if layout is None:
        if attention_mask is not None and not attention_mask.numel():
            raise PackingUnsupportedError(
                f"{type(module).__name__} does not pass the arguments of a forward pass to its attention"
            )
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **settings
        )
    unsupported = [name for name, default in UNSUPPORTED.items() if settings.get(name, default) is not default]
    if unsupported:
        raise PackingUnsupportedError(f"{type(module).__name__} needs {unsupported[0]}")
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    outputs = [_call(call, query, key, value, scaling, dropout) for call in layout.calls]
    return torch.cat(outputs).index_select(0, layout.output_index)[None], None


def _call(
    call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float
) -> Tensor:
    """Output [rows * Q, heads, head size] of one call; states are [L, heads, head size]."""
    num_queries, num_keys = call.queries.shape[1], call.keys.shape[1]

    def gather(states: Tensor, index: Tensor) -> Tensor:
        return states.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)

    output = scaled_dot_product_attention(
        gather(query, call.queries),
        gather(key, call.keys),
        gather(value, call.keys),
        attn_mask=None if num_queries == num_keys else _build_mask(num_queries, num_keys, query),
        is_causal=num_queries == num_keys,
        scale=scaling,
        dropout_p=dropout,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).flatten(0, 1)


def _build_mask(num_queries: int, num_keys: int, like: Tensor) -> Tensor:
    if like.is_cuda:  # CUDA kernels need no mask in memory
        return causal_lower_right(num_queries, num_keys)
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=like.device).tril(num_keys - num_queries)
    return torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill_(~visible, float("-inf"))


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
