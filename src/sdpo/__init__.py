"""SDPO: self-distillation policy optimization (arXiv 2601.20802).

The names below are the public interface; they are imported on first use, so that ``import sdpo`` costs nothing.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

# transformers imports torchao wherever it is installed, which then logs what it cannot load on a machine without CUDA.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

if TYPE_CHECKING:
    from sdpo.algorithm.ema import update_teacher_ema as update_teacher_ema
    from sdpo.algorithm.official import compute_self_distillation_loss as compute_self_distillation_loss
    from sdpo.config.loader import load_config as load_config
    from sdpo.config.root import SDPOConfig as SDPOConfig
    from sdpo.config.self_distillation import SelfDistillationConfig as SelfDistillationConfig
    from sdpo.errors import SDPOError as SDPOError
    from sdpo.kernels.fused_self_distillation import fused_self_distillation_loss as fused_self_distillation_loss
    from sdpo.trainer.trainer import SDPOTrainer as SDPOTrainer
    from sdpo.trainer.trainer import TrainOutput as TrainOutput

__version__ = "0.1.0"

_HOMES = {
    "compute_self_distillation_loss": "sdpo.algorithm.official",
    "fused_self_distillation_loss": "sdpo.kernels.fused_self_distillation",
    "update_teacher_ema": "sdpo.algorithm.ema",
    "SDPOConfig": "sdpo.config.root",
    "SelfDistillationConfig": "sdpo.config.self_distillation",
    "load_config": "sdpo.config.loader",
    "TrainOutput": "sdpo.trainer.trainer",
    "SDPOTrainer": "sdpo.trainer.trainer",
    "SDPOError": "sdpo.errors",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sdpo' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
