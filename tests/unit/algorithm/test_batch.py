"""TokenBatch: selection of rows, and defaults computed from the student's log-probabilities."""

from __future__ import annotations

import math
from dataclasses import fields

import torch
from torch import Tensor

from sdpo.algorithm.batch import TokenBatch
from sdpo.algorithm.regularization import Regularization

NAMES = [field.name for field in fields(TokenBatch) if "Tensor" in str(field.type)]
OTHERS = {
    "rollout_is_threshold": 1.5,
    "distillation_coef": 0.7,
    "regularization": Regularization(None, "kl", 0.1),
}


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_selection_applies_to_every_tensor_and_keeps_other_fields() -> None:
    tensors = {name: torch.arange(5.0) + 10 * i for i, name in enumerate(NAMES)}
    tensors |= {"sampled_ids": torch.arange(5), "distilled": torch.arange(5) % 2 == 0}
    batch = TokenBatch(**tensors, **OTHERS)
    assert {*NAMES, *OTHERS} == {field.name for field in fields(TokenBatch)}
    for rows in (slice(1, 3), torch.tensor([4, 0])):
        selected = batch.select(rows)
        for name in NAMES:
            assert torch.equal(getattr(selected, name), tensors[name][rows]), name
        assert {name: getattr(selected, name) for name in OTHERS} == OTHERS
    assert TokenBatch().select(slice(0, 2)) == TokenBatch()


def test_student_is_the_old_policy_without_old_log_probs() -> None:
    student = double(-1.0, -2.0).requires_grad_()
    batch = TokenBatch().complete(student)
    assert batch.old_log_probs is not None and not batch.old_log_probs.requires_grad
    assert torch.equal(batch.old_log_probs, student.detach())
    assert batch.rollout_is_weights is None
    assert TokenBatch(old_log_probs=double(-3.0, -4.0)).complete(student).old_log_probs is not None


def test_rollout_weights_default_to_truncated_ratios_of_the_old_policy() -> None:
    # Ratios 1/2 and 4, truncated at 3.
    student, rollout = double(-9.0, -9.0), double(-1.0, -1.0)
    old = rollout + double(math.log(0.5), math.log(4.0))
    batch = TokenBatch(old_log_probs=old, rollout_log_probs=rollout, rollout_is_threshold=3.0)
    weights = batch.complete(student).rollout_is_weights
    assert weights is not None
    torch.testing.assert_close(weights, double(0.5, 3.0))
    torch.testing.assert_close(TokenBatch(rollout_log_probs=rollout).complete(old).rollout_is_weights, double(0.5, 4.0))
    given = TokenBatch(rollout_is_weights=double(0.1, 0.2), rollout_log_probs=rollout)
    assert given.complete(student).rollout_is_weights is given.rollout_is_weights


def test_at_distilled_returns_the_same_tensor_if_all_tokens_are_distilled() -> None:
    values = double(1.0, 2.0, 3.0)
    assert TokenBatch().at_distilled(values, 3) is values
    partly_distilled = TokenBatch(distilled=torch.tensor([True, False, True]))
    assert partly_distilled.at_distilled(values, 2).tolist() == [1.0, 3.0]
