"""KL and entropy terms of the CUDA loss compared with the portable loss in float64; see ``test_loss.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="has no wheel for this system")

from sdpo import SelfDistillationConfig
from sdpo.algorithm.batch import TokenBatch
from sdpo.algorithm.regularization import Regularization
from sdpo.kernels import fused_linear_loss
from sdpo.kernels.chunked_log_probs import LinearHead
from sdpo.kernels.cuda import fused_loss
from sdpo.kernels.fused_linear_loss import FusedOutputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, V, H = 7, 75, 4
LEVELS: dict[str, dict[str, Any]] = {
    "forward KL": {"alpha": 0.0},
    "JSD": {"alpha": 0.5},
    "reverse KL": {"alpha": 1.0},
    "top-k": {"alpha": 0.5, "distillation_topk": 5},
    "sampled token": {"alpha": 1.0, "full_logit_distillation": False},
}
TERMS = {
    "both": Regularization(0.3, "low_var_kl", 0.2),
    "KL": Regularization(0.3, "k1+", 0.0),
    "entropy": Regularization(None, "kl", 0.2),
}


def run(
    compute: Any,
    config: SelfDistillationConfig,
    terms: Regularization,
    distilled_mask: Tensor | None,
    dtype: torch.dtype,
) -> tuple[FusedOutputs, list[Tensor]]:
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    leaves = [normal(N, H).requires_grad_(), normal(V, H).requires_grad_(), normal(V).requires_grad_()]
    teacher_hidden, teacher_head = normal(N, H), normal(V, H)
    tokens = TokenBatch(
        torch.randint(V, (N,), generator=generator).to(DEVICE),
        old_log_probs=normal(N) - 4.0,
        policy_weights=normal(N).abs(),
        advantages=normal(N),
        distilled=distilled_mask,
        distillation_weights=normal(N).abs(),
        ref_log_probs=normal(N) - 4.0,
        regularization=terms,
    )
    teacher = (
        [LinearHead(teacher_hidden[distilled_mask], teacher_head, softcap=2.0)] if distilled_mask is not None else []
    )
    outputs = compute(LinearHead(*leaves, softcap=2.0), teacher, tokens, config, temperature=0.7, chunk_size=3)
    (3.0 * outputs.loss).backward()
    return outputs, [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("distilled", ["some", "none"])
@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("level", LEVELS)
def test_terms_and_gradients_equal_the_portable_loss(level: str, name: str, distilled: str) -> None:
    config = SelfDistillationConfig(**LEVELS[level], policy_loss_weight=0.3)
    distilled_mask = (
        torch.tensor([True, False, True, True, False, True, True], device=DEVICE) if distilled == "some" else None
    )
    expected, expected_gradients = run(
        fused_linear_loss.fused_linear_sdpo_loss, config, TERMS[name], distilled_mask, torch.float64
    )
    outputs, gradients = run(fused_loss.fused_linear_sdpo_loss, config, TERMS[name], distilled_mask, torch.float32)
    tolerances = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(outputs.token_losses, expected.token_losses, **tolerances)
    for result, reference in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(result, reference, **tolerances)
    assert outputs.sums.keys() == expected.sums.keys()
    assert ("kl_loss" in outputs.sums) == (name != "entropy")
    for metric, (total, _) in expected.sums.items():
        assert float(outputs.sums[metric][0]) == pytest.approx(float(total), abs=1e-4), metric
