"""The student's weights on their way to a sampler.

To one in another process they travel through shared memory that both processes map once: nothing is pickled, and a
hand-over costs one copy on each side. Who writes and who reads is decided by the protocol in ``sampler.py``: the
actor writes only while the sampler is idle, and the sampler reads before it samples again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdpo.kernels.loss_inputs import gather_log_probs
from sdpo.models.lora.adapters import MergedParameters

PROBE_LENGTH = 16


class SharedWeights:
    """A copy of a student's parameters in shared memory, adapters merged into them."""

    def __init__(self, student: nn.Module) -> None:
        self.tensors: dict[str, Tensor] = {
            name: param.to("cpu", copy=True).share_memory_() for name, param in MergedParameters(student).items()
        }

    @torch.no_grad()
    def write(self, student: nn.Module) -> None:
        """Copy in what training changes; it has arrived when this returns, from a GPU too."""
        params = MergedParameters(student)
        for name, tensor in self.tensors.items():
            if params.changes(name):
                tensor.copy_(params[name])


@dataclass(frozen=True)
class WeightChecksum:
    """A few tokens, and what the student says of them, by which an engine's weights can be checked.

    Attributes:
        token_ids: L of them, from all over the vocabulary.
        log_probs: of the last L-1, each given those before it; at temperature 1.
    """

    token_ids: list[int]
    log_probs: list[float]


@torch.no_grad()
def compute_weight_checksum(student: nn.Module) -> WeightChecksum:
    """The probe of the student's weights as they are now."""
    vocab_size = student.get_input_embeddings().num_embeddings  # type: ignore[operator]
    token_ids = torch.linspace(0, vocab_size - 1, PROBE_LENGTH).long().flip(0)
    was_training = student.training
    student.eval()
    inputs = token_ids[None].to(next(student.parameters()).device)
    log_probs = student(input_ids=inputs, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    student.train(was_training)
    return WeightChecksum(token_ids.tolist(), gather_log_probs(log_probs, inputs[0, 1:]).tolist())


@torch.no_grad()
def copy_parameters(source: Mapping[str, Tensor], target: nn.Module) -> None:
    """Set every parameter of ``target`` from the tensor of the same name, across devices and data types."""
    params = dict(target.named_parameters())
    if params.keys() != source.keys():
        raise ValueError(f"weights of another model: {sorted(params.keys() ^ source.keys())[:3]} differ")
    for name, param in params.items():
        param.copy_(source[name])
