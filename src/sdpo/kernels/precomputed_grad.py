"""Gradients that are computed with the loss: by autograd for few numbers per token, then attached to the scalar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def differentiate(values: Tensor, leaves: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of the sum of the values by each leaf that is not None."""
    present = [leaf for leaf in leaves if leaf is not None]
    ones = torch.ones_like(values)
    gradients = iter(torch.autograd.grad(values, present, ones, allow_unused=True, materialize_grads=True))
    return [None if leaf is None else next(gradients) for leaf in leaves]


def attach_gradients(
    value: Tensor,
    gradients: Sequence[Tensor | None],
    leaves: Sequence[Tensor | None],
    scale: Callable[[Tensor, Tensor], Tensor] = torch.mul,
) -> Tensor:
    """Give a scalar known gradients, each of its leaf's shape; ``scale(gradient, scalar)`` multiplies in backward."""
    attached: Tensor = _PrecomputedGrad.apply(value, gradients, scale, *leaves)  # type: ignore[no-untyped-call]
    return attached


class _PrecomputedGrad(torch.autograd.Function):
    """A scalar with known gradients; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        gradients: Sequence[Tensor | None],
        scale: Callable[[Tensor, Tensor], Tensor],
        *leaves: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.scale = scale
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(None if known is None else ctx.scale(known, factor) for known in ctx.saved_tensors)
