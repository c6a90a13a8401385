"""LoRA on verl: adapters in PEFT's wrapper, and a sharded teacher that stores only deltas.

FSDP2 shards a layer's weight W [outputs, inputs] and its adapter's matrix B [outputs, rank] along the same dimension,
so that a rank's rows of s B A are its rows of B times all of A. The teacher's delta D, which follows s B A, is sharded
the same way. The teacher's forward pass gathers D layer by layer and adds it to the student's W.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from sdpo.algorithm.teacher import Teacher, is_updated
from sdpo.config.model import LoraConfig
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.models.lora.adapters import ADAPTER, build_peft_settings, get_adapted_layers

WRAPPED = "base_model.model."  # prefix of PEFT's wrapper before the names of a model's modules


def wrap_with_adapters(model: PreTrainedModel, config: LoraConfig) -> nn.Module:
    """Wrap the model by PEFT, as verl expects; only the adapters are trained, in float32.

    verl's own function casts adapters to the data type of W, in which small updates round to zero. No upstream issue
    found (2026-11).

    Raises:
        ConfigError: a name in ``target_modules`` matches no layer that can be adapted.
    """
    import peft

    settings = build_peft_settings(model, config)
    settings.task_type = peft.TaskType.CAUSAL_LM
    return peft.get_peft_model(model, settings, adapter_name=ADAPTER, autocast_adapter_dtype=True)


class ShardedDeltas:
    """The teacher's deltas D in float32, by the adapted weight's name in the plain model.

    ``values`` and ``read_student`` return this rank's shards [own outputs, inputs]; ``full`` has the sharded tensors.
    """

    saved_with_module = False

    def __init__(self, student: nn.Module) -> None:
        self.full: dict[str, DTensor] = {}
        for name, layer in get_adapted_layers(student).items():
            base: Any = layer.get_base_layer()
            zeros: Any = torch.zeros_like(base.weight, dtype=torch.float32, requires_grad=False)
            self.full[_plain(name)] = zeros

    @property
    def values(self) -> Mapping[str, Tensor]:
        return {name: delta.to_local() for name, delta in self.full.items()}

    def read_student(self, student: nn.Module) -> Iterator[Tensor]:
        return (_compute_own_delta(layer) for layer in get_adapted_layers(student).values())

    def write_module(self) -> None:
        """Do nothing: the teacher's forward pass reads ``full``."""

    def to(self, device: str) -> None:
        for name, delta in self.full.items():
            moved: Any = delta.to(device)
            self.full[name] = moved


class SharedTeacher(nn.Module):
    """The student's module with W + D in place of W + s B A, without dropout.

    Args:
        deltas: D; None for the base model, whose layers compute with W alone.
    """

    def __init__(self, student: nn.Module, deltas: ShardedDeltas | None) -> None:
        super().__init__()
        self.student = student
        self.deltas = deltas

    @property
    def config(self) -> Any:
        return self.student.config

    def get_output_embeddings(self) -> nn.Module:
        """Return the student's output layer, which is never adapted."""
        head: nn.Module = self.student.get_output_embeddings()  # type: ignore[operator]
        return head

    def forward(self, **inputs: Any) -> Any:
        was_training = self.student.training
        self.student.eval()
        try:
            with _replace_adapters(self.student, self.deltas.full if self.deltas is not None else {}):
                return self.student(**inputs)
        finally:
            self.student.train(was_training)


def build_lora_teacher(student: nn.Module, config: SelfDistillationConfig) -> Teacher:
    """Build the teacher of a sharded student whose adapters are still zero."""
    if config.teacher_regularization == "live":
        return Teacher(None, config)
    deltas = ShardedDeltas(student) if is_updated(config) else None
    return Teacher(SharedTeacher(student, deltas), config, deltas)


@torch.no_grad()
def _compute_own_delta(layer: Any) -> Tensor:
    """Compute this rank's rows of s B A, [own outputs, inputs] in float32, on the device of its shard of B."""
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    own = b.to_local().float()
    # An offloaded A is gathered on the device, where the ranks can communicate.
    full = a.to(a.device_mesh.device_type).full_tensor().to(own)
    return layer.scaling[ADAPTER] * (own @ full)


@contextmanager
def _replace_adapters(student: nn.Module, deltas: Mapping[str, DTensor]) -> Iterator[None]:
    layers = get_adapted_layers(student)
    for name, layer in layers.items():
        compute = partial(_compute_with_delta, layer.get_base_layer(), deltas.get(_plain(name)))
        layer.forward = compute  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


def _compute_with_delta(base: Any, delta: DTensor | None, input: Tensor) -> Tensor:
    """Compute x (W + D)^T + bias, inside the layer, where FSDP2 has gathered W."""
    weight: Tensor = base.weight
    if delta is not None:
        moved: Any = delta.to(device=weight.device, dtype=weight.dtype)
        weight = weight + moved.full_tensor()
    return nn.functional.linear(input, weight, base.bias)


def _plain(layer: str) -> str:
    return f"{layer.removeprefix(WRAPPED)}.weight"
