"""Patches for bugs of verl 0.9.1; ``docs/verl.md`` lists all workarounds, with those inside overridden methods.

Each patch names the upstream issue; ``tests/unit/verl_backend/test_stock_bugs.py`` reproduces the bugs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu


def skip_trl_value_head() -> None:
    """Keep verl from patching TRL's value head, which SDPO does not have.

    TRL 1.16 has no value head either (https://github.com/huggingface/trl/pull/7020), so verl's import of it raises.
    """
    from verl.models.transformers import monkey_patch

    monkey_patch.is_trl_available = lambda: False


@contextmanager
def keep_stock_attention(engine: Any) -> Iterator[None]:
    """Keep transformers' attention for packed rows while the engine builds a module.

    verl's own calls flash-attn for every ``attn_implementation``. transformers separates the sequences of a packed row
    by their position ids, with every implementation. No upstream issue found (2026-11).
    """
    packs_rows, engine.use_remove_padding = engine.use_remove_padding, False
    try:
        yield
    finally:
        engine.use_remove_padding = packs_rows


def repair_position_ids(data: TensorDict) -> None:
    """Split 3-D (M-RoPE) position ids into sequences again; verl splits them wrongly if all have the same length.

    https://github.com/verl-project/verl/pull/7901 fixes it (open in 2026-11).
    """
    positions = data.get("position_ids")
    if positions is None or not positions.is_nested or positions.dim() != 3:
        return
    values, offsets = positions.values(), data["input_ids"].offsets()
    if values.shape == (4, offsets[-1]) and torch.equal(positions.offsets(), offsets):
        positions._ragged_idx = 2
        return
    # The values are [sequences * 4, length], for every ragged dimension that verl has marked since.
    parts = list(values.unflatten(0, (len(data), 4)).unbind())
    data["position_ids"] = tu.nested_tensor_from_tensor_list(parts, ragged_idx=2)


class FlushIgnoringLogger(logging.LoggerAdapter):  # type: ignore[type-arg]
    """A logger that accepts ``flush``, an argument of ``print``.

    verl's V1 ``separate_async`` passes it if ``hybrid_engine`` is false, which raises. No upstream issue found
    (2026-11).
    """

    def process(self, msg: Any, kwargs: Any) -> Any:
        kwargs.pop("flush", None)
        return msg, kwargs
