"""The teacher of a student with adapters: the shared base model plus s B A, which follows the student's.

The product of averaged B and averaged A is not the average of B A: B starts at zero, so that teacher would lag behind.
So the matrix s B A is averaged, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sdpo.algorithm.teacher import Teacher, is_updated
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.models.lora.adapters import compute_delta, copy_without_adapters, get_adapted_layers


class TeacherDeltas:
    """Changes of the adapted layers' weights in the teacher's module, by weight name without adapters.

    The teacher's module has separate weights in these layers and shares all other weights with the student.
    """

    saved_with_module = False

    def __init__(self, module: nn.Module, student: nn.Module) -> None:
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []  # teacher's weight, base model's weight
        self._values: dict[str, Tensor] = {}
        for name in get_adapted_layers(student):
            layer = module.get_submodule(name)
            base: Tensor = layer.weight  # type: ignore[assignment]
            layer.weight = nn.Parameter(base.detach().clone(), requires_grad=False)
            self._pairs.append((layer.weight, base))
            self._values[f"{name}.weight"] = torch.zeros_like(base, dtype=torch.float32, requires_grad=False)

    @property
    def values(self) -> Mapping[str, Tensor]:
        return self._values

    def read_student(self, student: nn.Module) -> Iterator[Tensor]:
        return (compute_delta(layer) for layer in get_adapted_layers(student).values())

    @torch.no_grad()
    def write_module(self) -> None:
        for (weight, base), delta in zip(self._pairs, self._values.values(), strict=True):
            weight.copy_(base + delta)


def build_lora_teacher(student: PreTrainedModel, config: SelfDistillationConfig) -> Teacher:
    """Build the teacher of a student whose adapters are still zero."""
    if config.teacher_regularization == "live":
        return Teacher(None, config)
    module = copy_without_adapters(student).requires_grad_(False).eval()
    return Teacher(module, config, TeacherDeltas(module, student) if is_updated(config) else None)
