"""Importance ratios compared with a loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sdpo.algorithm.importance_sampling import MAX_LOG_RATIO, compute_ratio, compute_rollout_ratio


def test_ratio_is_clamped_to_exp_minus_20_and_exp_20() -> None:
    differences = [-1e6, -20.5, -20.0, -1.0, 0.0, 0.25, 20.0, 20.5, 1e6]
    log_probs = torch.tensor(differences, dtype=torch.float64) - 3.0
    expected = [math.exp(max(-20.0, min(20.0, d))) for d in differences]
    assert compute_ratio(log_probs, torch.full_like(log_probs, -3.0)).tolist() == pytest.approx(expected, rel=1e-13)
    assert MAX_LOG_RATIO == 20.0
    assert compute_ratio(torch.tensor([0.0]), torch.tensor([-1e4])).isfinite().all()


def test_gradient_of_the_ratio() -> None:
    log_probs = torch.tensor([-1.0, -2.0, 30.0], dtype=torch.float64, requires_grad=True)
    compute_ratio(log_probs, torch.tensor([-1.5, -2.0, 0.0], dtype=torch.float64)).sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == pytest.approx([math.exp(0.5), 1.0, 0.0])


def reference_ratio(old: np.ndarray, rollout: np.ndarray, sample_index: np.ndarray, level: str) -> list[float]:
    result = []
    for token, sample in enumerate(sample_index):
        tokens = np.flatnonzero(sample_index == sample) if level == "sequence" else [token]
        exponent = sum(old[u] - rollout[u] for u in tokens)
        result.append(math.exp(max(-20.0, min(20.0, exponent))))
    return result


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("scale", [0.3, 40.0])
def test_rollout_ratio(level: str, scale: float) -> None:
    rng = np.random.default_rng(1)
    sample_index = np.array([0, 0, 0, 0, 0, 1, 1, 3, 3, 4])  # sample 2 has no tokens
    old, rollout = -rng.exponential(size=(2, len(sample_index))) * scale
    expected = reference_ratio(old, rollout, sample_index, level)
    if scale > 1:
        assert max(expected) == math.exp(20)
        assert min(expected) == math.exp(-20)
    tensors = [torch.from_numpy(x).requires_grad_() for x in (old, rollout)]
    ratio = compute_rollout_ratio(*tensors, torch.from_numpy(sample_index), level)
    assert ratio is not None
    assert not ratio.requires_grad
    np.testing.assert_allclose(ratio.numpy(), expected, rtol=1e-13)


def test_rollout_ratio_is_none_if_disabled() -> None:
    assert compute_rollout_ratio(torch.zeros(2), torch.zeros(2), torch.zeros(2).long(), "none") is None


def test_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rollout_is must be one of none, token, sequence, got 'batch'"):
        compute_rollout_ratio(torch.zeros(2), torch.zeros(2), torch.zeros(2).long(), "batch")
