"""Linear layers on a CPU by oneDNN. For float32, torch asks MKL, which leaves half of what AVX-512 can do unused on
processors that are not Intel's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


@contextmanager
def fast_linear(*models: nn.Module) -> Iterator[None]:
    """Within, the models' float32 linear layers on the CPU multiply with oneDNN, where that pays; without gradients.

    The results differ by rounding alone.
    """
    found = (layer for model in models for layer in model.modules() if _gains(layer))
    layers = list(dict.fromkeys(found)) if _has_onednn() else []
    for layer in layers:
        layer.forward = partial(_multiply, layer)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _gains(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)  # somebody else's
        and layer.weight.dtype == torch.float32
        and layer.weight.device.type == "cpu"
    )


def _multiply(layer: nn.Linear, rows: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, layer.weight, layer.bias, "none", [], "")
    return product
