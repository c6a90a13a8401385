"""Counts torch's operations, and finds those that wait for the device."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SYNCHRONIZING = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal.default", "unique")


class OperationCounter(TorchDispatchMode):
    """Counts operations; raises on operations that synchronize with the device, or counts them.

    Attributes:
        counts: of operations by name, without views.
        num_operations: views included.
        reads: of synchronizing operations by name, if they may occur.
        largest: number of entries of the largest result.
    """

    VIEWS = ("view", "slice", "select", "t.default", "permute", "transpose", "expand", "unsqueeze", "alias", "detach")

    def __init__(self, *, may_read: bool = False) -> None:
        super().__init__()
        self.may_read = may_read
        self.counts: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.num_operations = 0
        self.largest = 0
        self.is_active = True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).removeprefix("aten.")
        if self.is_active and any(part in name for part in SYNCHRONIZING):
            self._note_read(name)
        if "index" in name and any(x.dtype == torch.bool for x in tree_leaves(args[1]) if isinstance(x, Tensor)):
            self._note_read(f"{name} by a mask")
        result = function(*args, **(kwargs or {}))
        if self.is_active:
            self.num_operations += 1
            self.counts[name] += not any(part in name for part in (*self.VIEWS, "empty"))
            sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self.largest = max([self.largest, *sizes])
        return result

    def leave_out_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Count no operations inside Triton kernels, because the interpreter uses torch too."""
        for module, names in (
            ("fused_loss", ("compute_row_statistics", "write_logits_gradient")),
            ("chunks", ("mix_logits",)),
            ("top_k", ("_gather_candidates",)),
        ):
            for name in names:
                loaded = importlib.import_module(f"sdpo.kernels.cuda.{module}")
                monkeypatch.setattr(loaded, name, self.pause(getattr(loaded, name)))

    def _note_read(self, name: str) -> None:
        if not self.may_read:
            raise AssertionError(f"{name} synchronizes with the device")
        self.reads[name] += 1

    def pause(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its operations are not counted."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.is_active = False
            try:
                return function(*args, **kwargs)
            finally:
                self.is_active = True

        return call
