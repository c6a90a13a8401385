"""Weight sync: copying the student's weights to a sampler.

A sampler in another process receives them through shared memory, which both processes map once: nothing is pickled, and
a weight sync costs one copy in each process. The messages of ``process.py`` order the accesses: the trainer writes
only while the sampler is idle, and the sampler reads before it samples again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdpo.algorithm.distributions import gather_log_probs
from sdpo.models.lora.adapters import MergedParameters

# Tokens of a weight checksum.
CHECKSUM_LENGTH = 16


class SharedWeights:
    """A copy of a student's parameters in shared memory, with LoRA adapters merged into them."""

    def __init__(self, student: nn.Module) -> None:
        self.tensors: dict[str, Tensor] = {
            name: param.to("cpu", copy=True).share_memory_() for name, param in MergedParameters(student).items()
        }

    @torch.no_grad()
    def write(self, student: nn.Module) -> None:
        """Copy the parameters that training changes; copies from a GPU are complete when this returns."""
        params = MergedParameters(student)
        for name, tensor in self.tensors.items():
            if params.changes(name):
                tensor.copy_(params[name])


@dataclass(frozen=True)
class WeightChecksum:
    """The student's log-probs of a fixed token sequence, to verify an engine's weights.

    Attributes:
        token_ids: [L], spread over the vocabulary.
        log_probs: [L - 1], of every token but the first, given the tokens before it; at temperature 1.
    """

    token_ids: list[int]
    log_probs: list[float]


@torch.no_grad()
def compute_weight_checksum(student: nn.Module) -> WeightChecksum:
    """Compute the checksum of the student's current weights."""
    vocab_size = student.get_input_embeddings().num_embeddings  # type: ignore[operator]
    token_ids = torch.linspace(0, vocab_size - 1, CHECKSUM_LENGTH).long().flip(0)
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
        raise ValueError(f"parameters of different models: {sorted(params.keys() ^ source.keys())[:3]} differ")
    for name, param in params.items():
        param.copy_(source[name])
