"""Linear layers with faster float32 products on a CPU, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sdpo.kernels.cpu.onednn import multiply, prefers_onednn, round_up_rows


class FastLinear(nn.Linear):
    """``nn.Linear`` with the same results up to rounding."""

    def forward(self, input: Tensor) -> Tensor:
        fast = input.is_cpu and input.dtype == self.weight.dtype == torch.float32
        if not fast or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        if torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad):
            output: Tensor = _Linear.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
            return output
        return _multiply_rows(round_up_rows(input), self.weight, self.bias, input.shape[:-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = round_up_rows(input)
        ctx.save_for_backward(rows, weight)
        return _multiply_rows(rows, weight, bias, input.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input_rows, weight = ctx.saved_tensors
        rows = round_up_rows(gradient)
        grad_input, grad_weight, grad_bias = ctx.needs_input_grad
        return (
            _multiply_rows(rows, weight.T, None, gradient.shape[:-1]) if grad_input else None,
            multiply(rows.T, input_rows.T) if grad_weight else None,
            gradient.flatten(0, -2).sum(0) if grad_bias else None,
        )


def _multiply_rows(rows: Tensor, weight: Tensor, bias: Tensor | None, shape: torch.Size) -> Tensor:
    """Multiply, drop the padding rows, and reshape to [..., out] for the shape [...]."""
    return multiply(rows, weight, bias)[: shape.numel()].unflatten(0, shape)


def speed_up_linear_layers(model: nn.Module) -> None:
    """Turn a model's linear layers into ``FastLinear`` if this machine prefers oneDNN."""
    if not prefers_onednn():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FastLinear
