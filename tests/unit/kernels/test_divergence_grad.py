"""Closed forms compared with autograd of ``sdpo.algorithm.divergence``, and the precision of the derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sdpo.algorithm import divergence as reference_module
from sdpo.kernels import divergence_grad
from sdpo.kernels.divergence_grad import compute_entropy, differentiate_divergence

ALPHAS = (0.0, 0.3, 0.5, 1.0)
STUDENT = [1 / 2, 1 / 4, 1 / 8, 1 / 8]
TEACHER = [1 / 8, 1 / 2, 1 / 8, 1 / 4]


def log(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("vocab_size", [9, 5000])  # above 4,096 entries, the code masks zeros only if it finds any
@pytest.mark.parametrize("has_zeros", [False, True])
def test_values_and_gradients_equal_autograd(alpha: float, vocab_size: int, has_zeros: bool) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    pair = 3.0 * torch.randn(2, 4, vocab_size, generator=generator, dtype=torch.float64)
    if has_zeros:
        pair[:, :2, 3] = -torch.inf
    results = []
    modules: tuple[Any, ...] = (divergence_grad, reference_module)
    for module in modules:
        logits = pair.clone().requires_grad_()
        student, teacher = logits.log_softmax(-1)
        value = module.compute_divergence(student, teacher, alpha)
        value.sum().backward()
        entropy = module.compute_entropy(student.detach())
        results.append((value.detach(), logits.grad, entropy))
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_given_probabilities_and_overwrite_do_not_change_the_result(alpha: float) -> None:
    student, teacher = log(*STUDENT, 0.0).repeat(3, 1), log(*TEACHER, 0.0).repeat(3, 1)
    expected = differentiate_divergence(student, teacher, alpha)
    copies = student.clone(), teacher.clone()
    results = differentiate_divergence(*copies, alpha, student=student.exp(), teacher=teacher.exp(), overwrite=True)
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=0.0, atol=1e-15)
    assert results[1].data_ptr() == copies[1].data_ptr()
    assert torch.equal(student, log(*STUDENT, 0.0).repeat(3, 1))
    assert torch.equal(teacher, log(*TEACHER, 0.0).repeat(3, 1))
    assert torch.equal(compute_entropy(student, student.exp()), compute_entropy(student.exp().log()))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_float32_derivative_is_precise_for_tiny_probabilities(alpha: float) -> None:
    """Log-ratios from -80 to 80, probabilities down to e^-83: compared with (1 - a) s log(s / m) in float64.

    exp of a float32 near -83 has a relative error of 83 * 2^-24 = 5e-6.
    """
    ratio = torch.linspace(-80.0, 80.0, 401)
    student, teacher = (-(ratio.abs() + side * ratio) / 2 - 3.0 for side in (1.0, -1.0))
    s, t = student.double().exp(), teacher.double().exp()
    mixture = (1 - alpha) * s + alpha * t
    value, derivative = differentiate_divergence(student, teacher, alpha)
    expected_derivative = (1 - alpha) * s * (s / mixture).log()
    expected_value = ((1 - alpha) * s * (s / mixture).log() + alpha * t * (t / mixture).log()).sum()
    normal = expected_derivative.abs() > 1e-36
    error = (derivative.double() - expected_derivative).abs() / ((1 - alpha) * s + expected_derivative.abs())
    assert float(error[normal].max()) < 1e-5
    assert int(normal.sum()) > 390
    assert float(value) == pytest.approx(float(expected_value), rel=1e-5)
