"""Loss terms for the KL to a reference model and for the entropy, compared with values computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sdpo import SelfDistillationConfig
from sdpo.algorithm.batch import TokenBatch
from sdpo.algorithm.distributions import TokenDistributions
from sdpo.algorithm.loss import compute_loss
from sdpo.algorithm.regularization import Regularization, estimate_kl
from sdpo.config.actor import KL_LOSS_TYPES

# The student's probability is twice the reference's, a third of it, and equal.
LOG_PROBS = [math.log(0.6), math.log(0.1), math.log(0.5)]
REF_LOG_PROBS = [math.log(0.3), math.log(0.3), math.log(0.5)]
LOG_2, LOG_3 = math.log(2), math.log(3)
BY_HAND: dict[str, tuple[list[float], list[float]]] = {
    # estimate: values, gradients by the student's log-probabilities
    "kl": ([LOG_2, -LOG_3, 0.0], [1.0, 1.0, 1.0]),
    "abs": ([LOG_2, LOG_3, 0.0], [1.0, -1.0, 0.0]),
    "mse": ([LOG_2**2 / 2, LOG_3**2 / 2, 0.0], [LOG_2, -LOG_3, 0.0]),
    "low_var_kl": ([0.5 - 1 + LOG_2, 3 - 1 - LOG_3, 0.0], [1 - 0.5, 1 - 3.0, 0.0]),
}
SYNONYMS = {"k1": "kl", "k2": "mse", "k3": "low_var_kl"}


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("kind", KL_LOSS_TYPES)
def test_kl_estimates_and_gradients(kind: str) -> None:
    name = kind.removesuffix("+")
    values, gradients = BY_HAND[SYNONYMS.get(name, name)]
    if kind != name:
        gradients = BY_HAND["mse"][1]
    log_probs, reference = double(LOG_PROBS).requires_grad_(), double(REF_LOG_PROBS).requires_grad_()
    estimate = estimate_kl(log_probs, reference, kind)
    assert estimate.tolist() == pytest.approx(values, abs=1e-14)
    estimate.sum().backward()
    assert log_probs.grad is not None and reference.grad is None
    assert log_probs.grad.tolist() == pytest.approx(gradients, abs=1e-14)


def test_low_variance_estimate_is_clamped() -> None:
    """The estimates of exp(30), exp(3) and a student far above the reference exceed 10, where the gradient is 0."""
    log_probs = double([-30.0, -3.0, -1.0]).requires_grad_()
    estimate = estimate_kl(log_probs, double([0.0, 0.0, -18.0]), "low_var_kl")
    assert estimate.tolist() == pytest.approx([10.0, 10.0, 10.0])
    estimate.sum().backward()
    assert log_probs.grad is not None and log_probs.grad.tolist() == [0.0, 0.0, 0.0]


def test_unknown_estimate_is_refused() -> None:
    with pytest.raises(ValueError, match="full"):
        estimate_kl(double([0.0]), double([0.0]), "full")


def test_terms_are_weighted_sums_over_all_response_tokens() -> None:
    """Without teacher and advantages, the loss is 0.4 (w . KL) - 0.3 (w . H)."""
    student = double(LOG_PROBS).requires_grad_()
    entropies = double([0.9, 0.2, 1.5]).requires_grad_()
    weights = double([0.5, 0.25, 0.25])
    batch = TokenBatch(
        policy_weights=weights,
        ref_log_probs=double(REF_LOG_PROBS),
        regularization=Regularization(0.4, "mse", 0.3),
    )
    tokens = TokenDistributions(student, student_entropies=entropies)
    outputs = compute_loss(batch, tokens, SelfDistillationConfig())
    kl = 0.5 * LOG_2**2 / 2 + 0.25 * LOG_3**2 / 2
    entropy = 0.5 * 0.9 + 0.25 * 0.2 + 0.25 * 1.5
    assert float(outputs.loss.detach()) == pytest.approx(0.4 * kl - 0.3 * entropy, abs=1e-14)
    # The count is 0, because the total is weighted already.
    total, count = outputs.sums["kl_loss"]
    assert (float(total), int(count)) == (pytest.approx(kl, abs=1e-14), 0)
    outputs.loss.backward()
    assert student.grad is not None and entropies.grad is not None
    assert student.grad.tolist() == pytest.approx([0.4 * 0.5 * LOG_2, -0.4 * 0.25 * LOG_3, 0.0], abs=1e-14)
    assert entropies.grad.tolist() == pytest.approx([-0.15, -0.075, -0.075], abs=1e-14)
    # With coefficients of 0, the KL is measured and the loss does not change.
    batch = replace(batch, regularization=Regularization(0.0, "mse", 0.0))
    measured = compute_loss(batch, tokens, SelfDistillationConfig())
    assert float(measured.loss.detach()) == 0.0
    assert float(measured.sums["kl_loss"][0]) == pytest.approx(kl, abs=1e-14)
