"""The loss on a GPU with a vocabulary of 151,936: comparison with float64, synchronization, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sdpo import SelfDistillationConfig
from sdpo.algorithm.batch import TokenBatch
from sdpo.kernels import dispatch, fused_linear_loss
from sdpo.kernels.chunked_log_probs import LinearHead

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

V, H = 151_936, 256
LEVELS: dict[str, dict[str, Any]] = {
    "forward KL": {"alpha": 0.0},
    "Jensen-Shannon": {"alpha": 0.5},
    "reverse KL": {"alpha": 1.0},
    "top 100 with tail": {"alpha": 0.5, "distillation_topk": 100},
    "sampled token": {"alpha": 1.0, "full_logit_distillation": False},
}


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, device="cuda")).to(dtype)


def make(n: int, dtype: torch.dtype, head_dtype: torch.dtype | None = None) -> tuple[LinearHead, LinearHead, Tensor]:
    torch.manual_seed(0)
    hidden, teacher_hidden = draw(n, H, dtype=dtype), draw(n, H, dtype=dtype)
    heads = [draw(V, H, dtype=dtype, scale=2 * H**-0.5).to(head_dtype or dtype) for _ in range(2)]
    student = LinearHead(hidden.requires_grad_(), heads[0].requires_grad_())
    return student, LinearHead(teacher_hidden, heads[1]), torch.randint(V, (n,), device="cuda")


def run(
    compute: Callable[..., Any], student: LinearHead, teacher: LinearHead, ids: Tensor, settings: dict[str, Any]
) -> Any:
    n = len(ids)
    tokens = TokenBatch(
        ids,
        distilled=torch.ones(n, dtype=torch.bool, device="cuda"),
        distillation_weights=torch.full((n,), 1 / n, device="cuda"),
    )
    return compute(student, [teacher], tokens, SelfDistillationConfig(**settings, is_clip=None))


def convert(logits: LinearHead, dtype: torch.dtype, *, leaf: bool) -> LinearHead:
    hidden, weight = (x.detach().to(dtype, copy=True).requires_grad_(leaf) for x in (logits.hidden, logits.weight))
    return LinearHead(hidden, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("level", LEVELS)
def test_loss_and_gradients_equal_float64(level: str, dtype: torch.dtype) -> None:
    """300 tokens in one chunk. In bfloat16 the top k differ where logits differ by less than their rounding error."""
    student, teacher, ids = make(300, dtype)
    assert dispatch.has_cuda_kernels(student.hidden)
    exact = convert(student, torch.float64, leaf=True)
    expected = run(
        fused_linear_loss.fused_linear_sdpo_loss, exact, convert(teacher, torch.float64, leaf=False), ids, LEVELS[level]
    )
    expected.loss.backward()
    result = run(dispatch.fused_linear_sdpo_loss, student, teacher, ids, LEVELS[level])
    result.loss.backward()
    is_half = dtype == torch.bfloat16
    assert float(result.loss.detach()) == pytest.approx(float(expected.loss.detach()), rel=0.01 if is_half else 1e-5)
    limit = (0.05 if "top" in level else 0.015) if is_half else 1e-4
    for name in ("hidden", "weight"):
        one, other = getattr(student, name).grad.double(), getattr(exact, name).grad
        assert float((one - other).norm() / other.norm()) < limit, name


@pytest.mark.parametrize("level", LEVELS)
def test_loss_does_not_synchronize_with_the_gpu(level: str) -> None:
    student, teacher, ids = make(5000, torch.bfloat16)
    run(dispatch.fused_linear_sdpo_loss, student, teacher, ids, LEVELS[level])  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(dispatch.fused_linear_sdpo_loss, student, teacher, ids, LEVELS[level])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("level", ["Jensen-Shannon", "top 100 with tail"])
def test_memory_stays_below_a_gigabyte_for_any_number_of_tokens(level: str) -> None:
    for n in (4096, 16_384):
        student, teacher, ids = make(n, torch.bfloat16)
        run(dispatch.fused_linear_sdpo_loss, student, teacher, ids, LEVELS[level])
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(dispatch.fused_linear_sdpo_loss, student, teacher, ids, LEVELS[level]).loss.backward()
        gradients = 2 * (student.hidden.numel() + student.weight.numel())
        assert torch.cuda.max_memory_allocated() - before - gradients < 1e9


def test_gradient_of_a_float32_head_is_summed_in_float32() -> None:
    """Six chunks: each product of half-precision factors accumulates into a float32 sum."""
    student, teacher, ids = make(12_000, torch.bfloat16, torch.float32)
    run(dispatch.fused_linear_sdpo_loss, student, teacher, ids, LEVELS["Jensen-Shannon"]).loss.backward()
    half = LinearHead(student.hidden.detach(), student.weight.detach().bfloat16().requires_grad_())
    run(dispatch.fused_linear_sdpo_loss, half, teacher, ids, LEVELS["Jensen-Shannon"]).loss.backward()
    one, other = student.weight.grad, half.weight.grad
    assert one is not None and other is not None and one.dtype == torch.float32
    difference = float((one - other.float()).norm() / one.norm())
    assert 2**-12 < difference < 2**-7  # rounding error of six sums in bfloat16
