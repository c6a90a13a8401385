"""Top-k entries of a distribution and their completion."""

from __future__ import annotations

import pytest
import torch

from sdpo import SelfDistillationConfig
from sdpo.algorithm.topk import complete_topk, topk_support


def test_topk_support_and_completion() -> None:
    log_probs = torch.tensor([[0.125, 0.5, 0.125, 0.25]], dtype=torch.float64).log()
    topk, ids = topk_support(log_probs, 2)
    assert ids.tolist() == [[1, 3]]
    assert topk.exp().tolist() == [[0.5, 0.25]]
    for add_tail, expected in ((True, [0.5, 0.25, 0.25]), (False, [2 / 3, 1 / 3])):
        config = SelfDistillationConfig(distillation_topk=2, distillation_add_tail=add_tail)
        assert complete_topk(topk, config).exp()[0].tolist() == pytest.approx(expected, abs=1e-15)
