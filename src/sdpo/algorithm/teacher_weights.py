"""The teacher's tensors that are updated from the student's, and how they get into the teacher's module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@runtime_checkable
class TeacherWeights(Protocol):
    """Teacher tensors, by name, that are updated from the student's, and how they get into the teacher's module."""

    @property
    def values(self) -> Mapping[str, Tensor]:
        """The teacher's tensors; float32 or float64 if they are averaged."""

    @property
    def saved_with_module(self) -> bool:
        """Whether ``values`` are the module's parameters, so that saving the module saves them."""

    def read_student(self, student: nn.Module) -> Iterable[Tensor]:
        """The student's tensors, with the shapes and order of ``values``; computed tensors one at a time."""

    def write_module(self) -> None:
        """Make the module compute with ``values``."""


class ModuleWeights:
    """All parameters of the teacher's module; if it is in half precision, the average is a float32 copy.

    Parameters may be shards (DTensor): each rank updates its own shards, without communication.
    """

    def __init__(self, module: nn.Module, averaged: bool) -> None:
        self._module = module
        params = get_shards(module)
        half = averaged and any(p.dtype not in (torch.float32, torch.float64) for p in params.values())
        self._average = {name: p.float() for name, p in params.items()} if half else None

    @property
    def values(self) -> Mapping[str, Tensor]:
        return self._average if self._average is not None else get_shards(self._module)

    @property
    def saved_with_module(self) -> bool:
        return self._average is None

    def read_student(self, student: nn.Module) -> Iterable[Tensor]:
        return get_shards(student).values()

    def write_module(self) -> None:
        if self._average is not None:
            copy_tensors(get_shards(self._module).values(), self._average.values())


def get_shards(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, or this rank's shards of them."""
    return {name: p.to_local() if isinstance(p, DTensor) else p.data for name, p in module.named_parameters()}


def copy_tensors(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Overwrite each target by its source."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
