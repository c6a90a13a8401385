"""Schedule of the distillation coefficient, and weights by prompt difficulty."""

from __future__ import annotations

import math

import pytest
import torch

from sdpo import SelfDistillationConfig
from sdpo.algorithm.aggregation import compute_distillation_coef, compute_prompt_weights


@pytest.mark.parametrize(
    ("start", "end", "step", "total", "expected"),
    [
        (1.0, 0.2, 1, 5, 1.0),
        (1.0, 0.2, 2, 5, 0.8),
        (1.0, 0.2, 3, 5, 0.6),
        (1.0, 0.2, 5, 5, 0.2),
        (0.0, 3.0, 7, 7, 3.0),
        (0.5, 0.9, 1, 1, 0.5),  # a run of one step uses the start value
        (1.0, 1.0, 3, 10, 1.0),
    ],
)
def test_scheduled_distillation_coefficient(start: float, end: float, step: int, total: int, expected: float) -> None:
    config = SelfDistillationConfig(distillation_coef_start=start, distillation_coef_end=end)
    assert compute_distillation_coef(config, step, total) == pytest.approx(expected, abs=1e-15)


def test_weights_by_prompt_difficulty() -> None:
    # sqrt(1/4 * 3/4) = sqrt(3) / 4; the weight is 0 if all or no rollouts succeed, and maximal at one half.
    weights = compute_prompt_weights(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64))
    assert weights.tolist() == pytest.approx([0.0, math.sqrt(3) / 4, 0.5, math.sqrt(3) / 4, 0.0], abs=1e-16)
    rounded = compute_prompt_weights(torch.tensor([1.0 + 1e-7, -1e-7]))
    assert rounded.tolist() == [0.0, 0.0]
