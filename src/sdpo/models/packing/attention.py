"""Attention over packed rows, registered as an attention implementation of transformers.

On NVIDIA GPUs and in half precision a layer makes one call of torch's kernel for segments of different lengths;
elsewhere it calls SDPA once for each set of segments with similar lengths. For rows that are not packed it calls
transformers' SDPA, except for the decoding steps of padded rows, where that would copy the cache.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sdpo.models.packing.attention_plan import AttentionCall, PackedLayout, SegmentBounds

try:
    from torch.nn.attention.varlen import varlen_attn  # since torch 2.10
except ImportError:
    varlen_attn = None  # type: ignore[assignment]

NAME = "sdpa_packed"
# torch 2.11 accepts fewer key than query heads without this argument; later versions require it.
ENABLE_GQA = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters
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
        shares_keys = query.shape[2] == 1 and query.shape[1] != key.shape[1]
        if shares_keys and attention_mask is not None and attention_mask.shape[1] == 1 and dropout == 0.0:
            return _attend_to_cache(query, key, value, attention_mask, scaling), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **settings
        )
    unsupported = [name for name, default in UNSUPPORTED.items() if settings.get(name, default) is not default]
    if unsupported:
        raise PackingUnsupportedError(f"{type(module).__name__} needs {unsupported[0]}")
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    is_autocast = query.is_cuda and torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if is_autocast else query.dtype
    if dropout == 0.0 and has_varlen_kernel(query.device, dtype, query.shape[-1]):
        query, key, value = (states.to(dtype) for states in (query, key, value))
        return _attend_at_once(layout.segment_bounds, query, key, value, scaling)[None], None
    calls = layout.attention_calls
    outputs = [_call(call, query, key, value, scaling, dropout) for call in calls.calls]
    return torch.cat(outputs).index_select(0, calls.output_index)[None], None


def _attend_to_cache(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """Output [rows, 1, heads, head size] of one new token per row, where query heads share keys and values.

    With a mask, transformers copies keys and values once per query head. Here, heads that share a key are the
    positions of one call.

    Args:
        query: [rows, heads, 1, head size].
        key, value: [rows, key heads, places, head size].
        mask: [rows, 1, 1, places].
    """
    grouped = query.squeeze(2).unflatten(1, (key.shape[1], -1))
    return scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling).flatten(1, 2)[:, None]


@cache
def has_varlen_kernel(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether torch's kernel for segments of different lengths (FlashAttention) computes attention of this kind."""
    if varlen_attn is None or device.type != "cuda" or torch.version.hip is not None:
        return False
    is_supported = dtype in (torch.bfloat16, torch.float16) and head_size % 8 == 0 and head_size <= 256
    return is_supported and torch.cuda.get_device_capability(device) >= (8, 0)


def _attend_at_once(bounds: SegmentBounds, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Output [L, heads, head size] of the row; states are [L, heads, head size]."""
    if bounds.key_index is not None:
        key, value = key.index_select(0, bounds.key_index), value.index_select(0, bounds.key_index)
    attend_to_segments: Any = varlen_attn
    output: Tensor = attend_to_segments(
        query,
        key,
        value,
        bounds.query_bounds,
        bounds.key_bounds,
        bounds.max_queries,
        bounds.max_keys,
        scale=scaling,
        window_size=(-1, 0),  # causal, aligned to the last query and the last key
        **({"enable_gqa": True} if ENABLE_GQA else {}),
    )
    return output


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
