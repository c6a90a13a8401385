"""Estimates of the KL divergence agree with verl's in values and gradients."""

from __future__ import annotations

import pytest
import torch
from verl.trainer.ppo.core_algos import kl_penalty

from sdpo.algorithm.regularization import estimate_kl
from sdpo.config.actor import KL_LOSS_TYPES


@pytest.mark.parametrize("kind", KL_LOSS_TYPES)
def test_kl_estimates_and_gradients_equal_verl_s(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    reference = -torch.rand(200, generator=generator, dtype=torch.float64) * 30
    results = []
    for estimate in (estimate_kl, kl_penalty):
        log_probs = (reference + torch.linspace(-25, 25, 200, dtype=torch.float64)).requires_grad_()
        values = estimate(log_probs, reference, kind)
        (gradient,) = torch.autograd.grad(values.sum(), log_probs)
        results.append((values.detach(), gradient))
    for ours, verls in zip(*results, strict=True):
        torch.testing.assert_close(ours, verls, rtol=1e-12, atol=1e-12)
