"""Warm-up of the learning rate."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from sdpo.models.warm_up import start_warm_up_at_first_update


@pytest.mark.parametrize(
    ("name", "num_steps", "factors"),
    [
        ("constant_with_warmup", 4, [0.25, 0.5, 0.75, 1, 1, 1]),
        ("constant_with_warmup", 1, [1] * 6),
        ("constant_with_warmup", 0, [1] * 6),
        ("linear", 2, [0.5, 1, 1, 0.75, 0.5, 0.25]),  # 6 updates, the decay begins after the warm-up
    ],
)
def test_factors_by_hand(name: str, num_steps: int, factors: list[float]) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.3}], lr=0.1)
    scheduler: LambdaLR = get_scheduler(name, optimizer, num_warmup_steps=num_steps, num_training_steps=6)
    start_warm_up_at_first_update(scheduler, num_steps)
    for factor in factors:
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 * factor, 0.3 * factor])
        assert scheduler.get_last_lr() == pytest.approx([0.1 * factor, 0.3 * factor])
        optimizer.step()
        scheduler.step()


def test_first_update_moves_the_weights() -> None:
    """With AdamW, the first update of each entry is the learning rate."""
    weight = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0)
    scheduler = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=5)
    start_warm_up_at_first_update(scheduler, 5)
    weight.grad = torch.tensor([1.0, -2.0, 0.5])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.02, 0.02, -0.02]))


def test_learning_rate_in_a_tensor_stays_the_same_object() -> None:
    low_bits = pytest.importorskip("torchao.optim")
    optimizer = low_bits.AdamW8bit([nn.Parameter(torch.zeros(3))], lr=0.1)
    held = optimizer.param_groups[0]["lr"]
    scheduler = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=5)
    start_warm_up_at_first_update(scheduler, 5)
    assert optimizer.param_groups[0]["lr"] is held
    assert held.item() == pytest.approx(0.02)
