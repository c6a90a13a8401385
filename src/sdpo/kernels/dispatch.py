"""Select the portable loss or the CUDA kernels by device; the only place that does."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sdpo.algorithm.batch import TokenBatch
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.kernels import chunked_log_probs, fused_linear_loss
from sdpo.kernels.chunked_log_probs import LinearHead
from sdpo.kernels.fused_linear_loss import FusedOutputs
from sdpo.kernels.self_check import kernels_agree


def fused_linear_sdpo_loss(
    student: LinearHead,
    teacher: Sequence[LinearHead],
    batch: TokenBatch,
    config: SelfDistillationConfig,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> FusedOutputs:
    """``fused_linear_loss.fused_linear_sdpo_loss``, by CUDA kernels if the hidden states' device and type allow."""
    compute = fused_linear_loss.fused_linear_sdpo_loss
    has_topk = config.distillation_topk is not None
    kind = (config.alpha, config.full_logit_distillation, has_topk, batch.has_entropy_term)
    if has_cuda_kernels(student.hidden) and kernels_agree(student.hidden.device, student.hidden.dtype, *kind):
        from sdpo.kernels.cuda.fused_loss import fused_linear_sdpo_loss as compute
    return compute(student, teacher, batch, config, temperature=temperature, chunk_size=chunk_size)


def score_tokens(
    student: LinearHead, sampled_ids: Int[Tensor, "N"], *, temperature: float = 1.0, chunk_size: int | None = None
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """``sdpo.kernels.chunked_log_probs.score_tokens``, by CUDA kernels if the hidden states' device and type allow."""
    score = chunked_log_probs.score_tokens
    if has_cuda_kernels(student.hidden) and kernels_agree(student.hidden.device, student.hidden.dtype):
        from sdpo.kernels.cuda.fused_loss import score_tokens as score
    return score(student, sampled_ids, temperature=temperature, chunk_size=chunk_size)


def has_cuda_kernels(hidden: Float[Tensor, "N H"]) -> bool:
    """Whether ``sdpo.kernels.cuda`` supports hidden states of this device and type."""
    return hidden.is_cuda and hidden.dtype != torch.float64 and _supports_kernels(hidden.device)


@cache
def _supports_kernels(device: torch.device) -> bool:
    """Whether the GPU is Ampere or later; older GPUs lack bfloat16, and AMD GPUs have another warp size."""
    if torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
