"""Check that a model reads the sequences of a packed row separately, as verl's engine relies on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sdpo.errors import ConfigError
from sdpo.models.self_check import TOLERANCE, TOLERANCE_IN_HALF_PRECISION

LENGTHS = (7, 5)
ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")


@torch.no_grad()
def check_packed_rows(module: nn.Module) -> None:
    """Compare a row of two sequences with a forward pass of the second alone.

    verl separates the sequences of a row by their positions alone. Layers with a recurrent state do not read positions,
    and some attention layers of transformers build their mask without them. Models without weights on this rank, on
    another device or with attention that a CPU does not have are not checked.

    Raises:
        ConfigError: the sequences are not separate.
    """
    model: Any = module
    param = next(module.parameters())
    has_images = hasattr(model.config, "vision_config")
    if param.device.type != "cpu" or has_images or model.config._attn_implementation not in ("sdpa", "eager"):
        return
    others = set(getattr(model.config, "layer_types", None) or ()) - set(ATTENTION)
    sequences = [torch.arange(3, 3 + length)[None] for length in LENGTHS]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    was_training = module.training
    module.eval()
    try:
        row = model(input_ids=torch.cat(sequences, 1), position_ids=positions, use_cache=False).logits[0, LENGTHS[0] :]
        alone = model(input_ids=sequences[1], use_cache=False).logits[0]
        difference = float((row.float().log_softmax(-1) - alone.float().log_softmax(-1)).abs().mean())
    except TypeError:  # the model has no argument for positions
        difference = float("inf")
    finally:
        module.train(was_training)
    if others or not difference <= TOLERANCE.get(param.dtype, TOLERANCE_IN_HALF_PRECISION):
        reason = f"layers of type {', '.join(sorted(others))}" if others else f"a difference of {difference:.2g} nats"
        raise ConfigError(
            f"actor_rollout_ref.model.use_remove_padding=true: {type(module).__name__} does not separate the sequences "
            f"of a packed row ({reason}); set it to false"
        )
