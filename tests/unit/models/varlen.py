"""A stand-in for torch's attention kernel for segments of different lengths, which needs a GPU.

Each is one operation for a dispatch mode, as the kernel is.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor


def _segments(bounds: Tensor) -> list[slice]:
    return [slice(start, end) for start, end in itertools.pairwise(bounds.tolist())]


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities, and query, repeated key and repeated value, all [heads, tokens, size], in float64."""
    repeats = query.shape[1] // key.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (query, key, value))
    k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
    visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    scores = (scale * q @ k.transpose(1, 2)).masked_fill(~visible, float("-inf"))
    return scores.softmax(-1), q, k, v


@torch.library.custom_op("sdpo_tests::varlen", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    max_queries: int,
    max_keys: int,
    scale: float,
) -> Tensor:
    assert query_bounds.dtype == key_bounds.dtype == torch.int32
    assert max_queries == int(query_bounds.diff().max()) and max_keys == int(key_bounds.diff().max())
    assert query_bounds[-1] == len(query) and key_bounds[-1] == len(key) == len(value)
    output = torch.empty(query.shape, dtype=query.dtype)
    for q, k in zip(_segments(query_bounds), _segments(key_bounds), strict=True):
        probs, _, _, values = _attend(query[q], key[k], value[k], scale)
        output[q] = (probs @ values).transpose(0, 1).to(query.dtype)
    return output


@torch.library.custom_op("sdpo_tests::varlen_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, query_bounds: Tensor, key_bounds: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grads = tuple(torch.zeros(x.shape, dtype=x.dtype) for x in (query, key, value))
    for q, k in zip(_segments(query_bounds), _segments(key_bounds), strict=True):
        probs, queries, keys, values = _attend(query[q], key[k], value[k], scale)
        by_output = grad[q].double().transpose(0, 1)
        by_probs = by_output @ values.transpose(1, 2)
        by_scores = scale * probs * (by_probs - (probs * by_probs).sum(-1, keepdim=True))
        full = (by_scores @ keys, by_scores.transpose(1, 2) @ queries, probs.transpose(1, 2) @ by_output)
        for into, part, place in zip(grads, full, (q, k, k), strict=True):
            heads = into.shape[1]
            into[place] = part.unflatten(0, (heads, -1)).sum(1).transpose(0, 1).to(into.dtype)
    return grads


def _save(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.scale = inputs[-1]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(grad, *ctx.saved_tensors, ctx.scale), None, None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """Arguments and checks of ``torch.nn.attention.varlen.varlen_attn``, for causal attention."""
    assert window_size == (-1, 0) and (enable_gqa or query.shape[1] == key.shape[1])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _forward(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale)
