"""Gradient checkpointing without the random numbers of training mode.

transformers recomputes activations in training mode only, and that mode also enables dropout (Granite has 0.1), the
router noise of mixtures of experts and similar. Student, teacher and sampler must compute the same distribution.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdpo.errors import ConfigError
from sdpo.models.forward import compute_hidden, pad_sequences
from sdpo.models.multimodal.processor import TokenPrompt


def set_training_mode(model: nn.Module, *, checkpoints: bool) -> None:
    """Set evaluation mode; with ``checkpoints``, modules that recompute activations, and only they, have the flag."""
    model.eval()
    for module in model.modules() if checkpoints else ():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
            for name, value in list(vars(module).items()):
                if isinstance(value, float) and "drop" in name:  # OPT's layers call dropout themselves
                    setattr(module, name, 0.0)


def check_training_mode(model: nn.Module) -> None:
    """Check that a language model computes the same with gradient checkpointing as in evaluation.

    Raises:
        ConfigError: it draws random numbers.
    """
    was_training = model.training
    device = next(model.parameters()).device
    row = pad_sequences([TokenPrompt([0, 1, 2])], [[1, 2]], 0, device)

    def read(checkpoints: bool) -> Tensor:
        set_training_mode(model, checkpoints=checkpoints)
        with torch.random.fork_rng(enabled=True), torch.no_grad():
            return compute_hidden(model, row)

    try:
        expected, found = read(False), read(True)
    finally:
        model.train(was_training)
    if not torch.allclose(expected, found, rtol=1e-2, atol=1e-3 * float(expected.abs().max())):
        raise ConfigError(
            f"actor.gradient_checkpointing=true: {type(model).__name__} draws random numbers in training mode, so that "
            "student and teacher would differ; set it to false"
        )
