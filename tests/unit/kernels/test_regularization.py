"""Gradients of the KL and entropy terms from hidden states: values by hand, and finite differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sdpo import SelfDistillationConfig
from sdpo.algorithm.batch import TokenBatch
from sdpo.algorithm.regularization import Regularization
from sdpo.kernels.chunked_log_probs import LinearHead
from sdpo.kernels.fused_linear_loss import fused_linear_sdpo_loss

LOG_2 = math.log(2)


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_gradient_of_the_entropy_by_the_logits() -> None:
    """Probabilities 1/2, 1/4, 1/4 and 0: H = 1.5 log 2, and dH / dz_j = -s_j (log s_j + H)."""
    head = torch.eye(4, dtype=torch.float64)
    bias = double([0.0, 0.0, 0.0, -math.inf])
    hidden = double([[LOG_2, 0.0, 0.0, 0.0]]).requires_grad_()
    tokens = TokenBatch(torch.tensor([1]), policy_weights=double([1.0]), regularization=Regularization(None, "kl", 1.0))
    outputs = fused_linear_sdpo_loss(LinearHead(hidden, head, bias), [], tokens, SelfDistillationConfig())
    assert float(outputs.loss.detach()) == pytest.approx(-1.5 * LOG_2, abs=1e-14)
    outputs.loss.backward()
    assert hidden.grad is not None
    # -dH / dz: s_j (log s_j + H) = (1/2)(-1 + 1.5) log 2, (1/4)(-2 + 1.5) log 2 twice, 0 where s_j = 0.
    assert hidden.grad[0].tolist() == pytest.approx([0.25 * LOG_2, -0.125 * LOG_2, -0.125 * LOG_2, 0.0], abs=1e-14)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradients_equal_finite_differences(softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden, head, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((5, 3), (9, 3), (9,))
    )
    tokens = TokenBatch(
        torch.tensor([0, 8, 3, 3, 1]),
        policy_weights=double([0.1, 0.3, 0.2, 0.4, 0.5]),
        ref_log_probs=double([-1.0, -2.5, -0.5, -3.0, -2.0]),
        regularization=Regularization(0.7, "low_var_kl", 0.6),
    )

    def value(*leaves: Tensor) -> Tensor:
        student = LinearHead(*leaves, softcap)
        return fused_linear_sdpo_loss(student, [], tokens, SelfDistillationConfig(), temperature=0.7, chunk_size=2).loss

    assert torch.autograd.gradcheck(value, (hidden, head, bias), atol=1e-8)
