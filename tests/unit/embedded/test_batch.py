"""Micro-batches: nothing lost, nothing over budget, and logits as if each sample stood alone and unpadded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sdpo.embedded.batch import build_micro_batch, compute_response_logits, split_by_tokens
from sdpo.embedded.samples import Sample

CPU = torch.device("cpu")
LENGTHS = st.tuples(st.integers(1, 30), st.integers(0, 40), st.integers(1, 20))


def padded_tokens(samples: list[Sample]) -> int:
    """Counted on the tensors themselves."""
    batch = build_micro_batch(samples, 0, CPU)
    return batch.student.token_ids.numel() + (0 if batch.teacher is None else batch.teacher.token_ids.numel())


@given(lengths=st.lists(LENGTHS, min_size=1, max_size=20), max_tokens=st.integers(1, 400))
def test_every_sample_once_and_within_the_budget(
    make_sample: Callable[..., Sample], lengths: list[tuple[int, int, int]], max_tokens: int
) -> None:
    samples = [make_sample([3] * p, [4] * r, [5] * t if t else None) for p, t, r in lengths]
    pieces = split_by_tokens(samples, max_tokens)
    assert sorted(i for piece in pieces for i in piece) == list(range(len(samples)))
    for piece in pieces:
        assert len(piece) == 1 or padded_tokens([samples[i] for i in piece]) <= max_tokens


def test_the_budget_is_used(make_sample: Callable[..., Sample]) -> None:
    """Ten samples of 10 + 20 tokens: three fit in 100 tokens, all in 300, and none in 29, where each stands alone."""
    samples = [make_sample([3] * 6, [4] * 4, [5] * 16) for _ in range(10)]
    assert [len(piece) for piece in split_by_tokens(samples, 100)] == [3, 3, 3, 1]
    assert [len(piece) for piece in split_by_tokens(samples, 300)] == [10]
    assert [len(piece) for piece in split_by_tokens(samples, 29)] == [1] * 10


@pytest.mark.parametrize("undistilled", [(), (1, 4), (0, 1, 2, 3, 4, 5)])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logits_are_those_of_each_sample_alone(
    model: Any,
    make_model: Callable[..., Any],
    make_samples: Callable[..., list[Sample]],
    plain_logits: Callable[..., Tensor],
    undistilled: tuple[int, ...],
    temperature: float,
) -> None:
    teacher = make_model(seed=1)
    samples = make_samples(undistilled=undistilled)
    batch = build_micro_batch(samples, 0, CPU)

    logits = compute_response_logits([(model, 1.0)], batch.student, temperature)
    alone = [plain_logits(model, s.prompt.token_ids, s.response.token_ids) / temperature for s in samples]
    torch.testing.assert_close(logits, torch.cat(alone), atol=1e-5, rtol=1e-5)

    distilled = [s for i, s in enumerate(samples) if i not in undistilled]
    if not distilled:
        assert batch.teacher is None
        return
    policy = [(teacher, 0.75), (model, 0.25)]
    assert batch.teacher is not None
    logits = compute_response_logits(policy, batch.teacher, temperature)
    rows = [
        [plain_logits(module, s.teacher_prompt.token_ids, s.response.token_ids) for module, _ in policy]
        for s in distilled
    ]
    expected = torch.cat([0.75 * first + 0.25 * second for first, second in rows]) / temperature
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


class WithAllLogits(nn.Module):
    """A model that takes ``logits_to_keep`` and ignores it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, logits_to_keep: int, **inputs: Any) -> Any:
        return self.model(**inputs)


def test_a_model_that_gives_all_logits(model: Any, make_samples: Callable[..., list[Sample]]) -> None:
    sequences = build_micro_batch(make_samples(), 0, CPU).student
    torch.testing.assert_close(
        compute_response_logits([(WithAllLogits(model), 1.0)], sequences, 1.0),
        compute_response_logits([(model, 1.0)], sequences, 1.0),
        atol=1e-5,
        rtol=1e-5,
    )


def test_packed_values_stand_beside_their_tokens(make_samples: Callable[..., list[Sample]]) -> None:
    samples = make_samples(undistilled=(1, 4))
    batch = build_micro_batch(samples, 0, CPU)
    tokens = [(i, k) for i, s in enumerate(samples) for k in range(len(s.response.token_ids))]
    assert batch.sample_index.tolist() == [i for i, _ in tokens]
    assert batch.sampled_ids.tolist() == [samples[i].response.token_ids[k] for i, k in tokens]
    assert batch.distilled.tolist() == [i not in (1, 4) for i, _ in tokens]
    expected = torch.tensor([samples[i].response.log_probs[k] for i, k in tokens])
    torch.testing.assert_close(batch.rollout_log_probs, expected)
    torch.testing.assert_close(batch.advantages, torch.tensor([samples[i].advantage for i, _ in tokens]))


def test_two_samples_laid_out_by_hand(make_sample: Callable[..., Sample]) -> None:
    batch = build_micro_batch([make_sample([3], [4, 5, 2]), make_sample([6, 7], [8], [9, 9, 9])], 0, CPU)
    assert batch.student.token_ids.tolist() == [[0, 3, 4, 5, 2], [6, 7, 8, 0, 0]]
    assert batch.student.attention_mask.tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.student.position_ids[0, 1:].tolist() == [0, 1, 2, 3]
    assert batch.student.position_ids[1, :3].tolist() == [0, 1, 2]
    assert batch.student.response_mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.teacher is not None
    assert batch.teacher.token_ids.tolist() == [[9, 9, 9, 8]]
