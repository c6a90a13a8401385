"""Which form of the loss a device gets. The only place that asks."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from sdpo.algorithm import fused, logits
from sdpo.algorithm.fused import FusedOutputs, TokenInputs
from sdpo.algorithm.logits import LazyLogits
from sdpo.config import SelfDistillationConfig
from sdpo.kernels.self_check import kernels_agree


def compute_fused_loss(
    student: LazyLogits,
    teacher: Sequence[LazyLogits],
    tokens: TokenInputs,
    config: SelfDistillationConfig,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> FusedOutputs:
    """``sdpo.algorithm.fused.compute_fused_loss`` in the form for the device and type of the hidden states."""
    compute = fused.compute_fused_loss
    kind = (config.alpha, config.full_logit_distillation, config.distillation_topk is not None)
    if has_cuda_kernels(student.hidden) and kernels_agree(student.hidden.device, student.hidden.dtype, *kind):
        from sdpo.kernels.cuda.fused_loss import compute_fused_loss as compute
    return compute(student, teacher, tokens, config, temperature=temperature, chunk_size=chunk_size)


def score_tokens(
    student: LazyLogits, sampled_ids: Tensor, *, temperature: float = 1.0, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """``sdpo.algorithm.logits.score_tokens`` in the form for the device and type of the hidden states."""
    score = logits.score_tokens
    if has_cuda_kernels(student.hidden) and kernels_agree(student.hidden.device, student.hidden.dtype):
        from sdpo.kernels.cuda.fused_loss import score_tokens as score
    return score(student, sampled_ids, temperature=temperature, chunk_size=chunk_size)


def has_cuda_kernels(hidden: Tensor) -> bool:
    """Whether hidden states of this device and type go through ``sdpo.kernels.cuda``."""
    return hidden.is_cuda and hidden.dtype != torch.float64 and _supports_kernels(hidden.device)


@cache
def _supports_kernels(device: torch.device) -> bool:
    """From Ampere on; what is older has no bfloat16, and AMD's GPUs have warps of another size."""
    if torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
