"""The student's weights on their way to a sampler in another process.

They travel through shared memory that both processes map once: nothing is pickled, and a hand-over costs one copy on
each side. Who writes and who reads is decided by the protocol in ``sampler.py``: the learner writes only while the
sampler is idle, and the sampler reads before it samples again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SharedWeights:
    """A copy of a model's parameters in shared memory."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors: dict[str, Tensor] = {
            name: torch.empty_like(param, device="cpu", requires_grad=False).share_memory_()
            for name, param in model.named_parameters()
        }
        self.write(model)

    @torch.no_grad()
    def write(self, model: nn.Module) -> None:
        """Copy the model's parameters in; they have arrived when this returns, from a GPU too."""
        for name, param in model.named_parameters():
            self.tensors[name].copy_(param)

    @torch.no_grad()
    def read(self, model: nn.Module) -> None:
        """Copy them into the parameters of a model of the same architecture."""
        copy_parameters(self.tensors, model)


@torch.no_grad()
def copy_parameters(source: dict[str, Tensor], target: nn.Module) -> None:
    """Set every parameter of ``target`` from the tensor of the same name, across devices and data types."""
    params = dict(target.named_parameters())
    if params.keys() != source.keys():
        raise ValueError(f"weights of another model: {sorted(params.keys() ^ source.keys())[:3]} differ")
    for name, param in params.items():
        param.copy_(source[name])
