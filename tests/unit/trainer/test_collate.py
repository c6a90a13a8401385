"""Micro-batches contain every sample within the budget, and give the logits of each sample alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdpo.models.forward import PaddedSequences, compute_hidden
from sdpo.models.output_head import build_linear_head, compute_dense_logits
from sdpo.models.packing.attention_plan import AttentionCostModel
from sdpo.models.packing.layout import PackedSequences
from sdpo.models.packing.support import enable_packing
from sdpo.trainer.actor.collate import Collator
from sdpo.trainer.data.samples import TrainingSample

CPU = torch.device("cpu")
LENGTHS = st.tuples(st.integers(1, 30), st.integers(0, 40), st.lists(st.integers(1, 20), min_size=1, max_size=4))
# Only tokens have a cost, so that shared prompts always pay off.
SHARES = AttentionCostModel(flops_per_token=1.0, flops_per_pair=0.0, flops_per_call=0.0)
NEVER_SHARES = AttentionCostModel(flops_per_token=0.0, flops_per_pair=1.0, flops_per_call=1e9)
COSTS = {"padded": None, "packed": NEVER_SHARES, "shared": SHARES}


def count_tokens(collator: Collator, samples: Sequence[TrainingSample]) -> int:
    """Tokens in the tensors of a batch."""
    batch = collator.collate(samples)
    return batch.student.token_ids.numel() + (0 if batch.teacher is None else batch.teacher.token_ids.numel())


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
@settings(deadline=None)
@given(lengths=st.lists(LENGTHS, min_size=1, max_size=8), max_tokens=st.integers(1, 400))
def test_each_sample_is_in_one_micro_batch_within_the_budget(
    make_sample: Callable[..., TrainingSample],
    cost: AttentionCostModel | None,
    lengths: list[tuple[int, int, list[int]]],
    max_tokens: int,
) -> None:
    samples: list[TrainingSample] = []
    for prompt_length, teacher_length, response_lengths in lengths:
        prompt: Any = [3] * prompt_length
        for length in response_lengths:
            samples.append(make_sample(prompt, [4] * length, [5] * teacher_length if teacher_length else None))
            prompt = samples[-1].prompt
    collator = Collator(0, CPU, cost=cost)
    micro_batches = collator.split(samples, max_tokens)
    assert sorted(i for micro_batch in micro_batches for i in micro_batch) == list(range(len(samples)))
    for micro_batch in micro_batches:
        assert len(micro_batch) == 1 or count_tokens(collator, [samples[i] for i in micro_batch]) <= max_tokens
    if cost is not None:  # one more sample would exceed the budget
        for micro_batch, following in pairwise(micro_batches):
            assert count_tokens(collator, [samples[i] for i in [*micro_batch, following[0]]]) > max_tokens


@pytest.mark.parametrize(("cost", "sizes"), [(None, [3, 3, 3, 1]), (NEVER_SHARES, [3, 3, 3, 1]), (SHARES, [9, 1])])
def test_micro_batches_fill_the_budget(
    make_sample: Callable[..., TrainingSample], cost: AttentionCostModel | None, sizes: list[int]
) -> None:
    """Ten rollouts of one prompt have 6 + 4 tokens each, and 16 + 4 for the teacher, so that three fit into 100.

    With shared prompts they have 22 tokens, and 8 more per rollout.
    """
    samples = [make_sample([3] * 6, [4] * 4, [5] * 16)]
    samples += [make_sample(samples[0].prompt, [4] * 4, [5] * 16) for _ in range(9)]
    collator = Collator(0, CPU, cost=cost)
    assert [len(micro_batch) for micro_batch in collator.split(samples, 100)] == sizes
    assert [len(micro_batch) for micro_batch in collator.split(samples, 300)] == [10]
    assert [len(micro_batch) for micro_batch in collator.split(samples, 29)] == [1] * 10


@pytest.mark.parametrize("undistilled", [(), (1, 4), (0, 1, 2, 3, 4, 5)])
@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
def test_logits_equal_those_of_each_sample_alone(
    make_model: Callable[..., Any],
    make_samples: Callable[..., list[TrainingSample]],
    plain_logits: Callable[..., Tensor],
    cost: AttentionCostModel | None,
    undistilled: tuple[int, ...],
) -> None:
    student, teacher = make_model(), make_model(seed=1)
    samples = make_samples(undistilled=undistilled)
    distilled = [s for i, s in enumerate(samples) if i not in undistilled]
    expected = [plain_logits(student, s.prompt.token_ids, s.response.token_ids) for s in samples]
    expected_teacher = [plain_logits(teacher, s.teacher_prompt.token_ids, s.response.token_ids) for s in distilled]
    if cost is not None:
        assert enable_packing(student) is not None
        assert enable_packing(teacher) is not None
    batch = Collator(0, CPU, cost=cost).collate(samples)

    def compute(model: Any, sequences: PaddedSequences | PackedSequences) -> Tensor:
        return compute_dense_logits(build_linear_head(model, compute_hidden(model, sequences)))

    torch.testing.assert_close(compute(student, batch.student), torch.cat(expected), atol=1e-5, rtol=1e-5)
    if not distilled:
        assert batch.teacher is None
        return
    assert batch.teacher is not None
    torch.testing.assert_close(compute(teacher, batch.teacher), torch.cat(expected_teacher), atol=1e-5, rtol=1e-5)


def test_values_per_token_are_in_the_order_of_the_tokens(make_samples: Callable[..., list[TrainingSample]]) -> None:
    samples = make_samples(undistilled=(1, 4))
    batch = Collator(0, CPU).collate(samples)
    tokens = [(i, k) for i, s in enumerate(samples) for k in range(len(s.response.token_ids))]
    assert batch.sample_index.tolist() == [i for i, _ in tokens]
    assert batch.sampled_ids.tolist() == [samples[i].response.token_ids[k] for i, k in tokens]
    assert batch.distilled.tolist() == [i not in (1, 4) for i, _ in tokens]
    expected = torch.tensor([samples[i].response.log_probs[k] for i, k in tokens])
    torch.testing.assert_close(batch.rollout_log_probs, expected)
    torch.testing.assert_close(batch.advantages, torch.tensor([samples[i].advantage for i, _ in tokens]))


def test_padding_of_two_samples(make_sample: Callable[..., TrainingSample]) -> None:
    batch = Collator(0, CPU).collate([make_sample([3], [4, 5, 2]), make_sample([6, 7], [8], [9, 9, 9])])
    assert isinstance(batch.student, PaddedSequences)
    assert batch.student.token_ids.tolist() == [[0, 3, 4, 5, 2], [6, 7, 8, 0, 0]]
    assert batch.student.attention_mask.tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.student.position_ids[0, 1:].tolist() == [0, 1, 2, 3]
    assert batch.student.position_ids[1, :3].tolist() == [0, 1, 2]
    assert batch.student.response_mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.teacher is not None
    assert batch.teacher.token_ids.tolist() == [[9, 9, 9, 8]]


def test_packing_of_three_samples(make_sample: Callable[..., TrainingSample]) -> None:
    """Two rollouts share a prompt and the first two tokens of their teacher prompts; the third rollout has another."""
    first = make_sample([3, 6], [4, 5, 2], [7, 8, 9])
    samples = [first, make_sample(first.prompt, [5, 2], [7, 8, 3, 3]), make_sample([3, 6], [4])]
    batch = Collator(0, CPU, cost=SHARES).collate(samples)
    assert isinstance(batch.student, PackedSequences) and isinstance(batch.teacher, PackedSequences)
    assert batch.student.token_ids.tolist() == [[3, 6, 4, 5, 2, 5, 2, 3, 6, 4]]
    assert batch.student.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0, 1, 2]]
    assert batch.student.predictor_index.tolist() == [1, 2, 3, 1, 5, 8]
    assert batch.teacher.token_ids.tolist() == [[7, 8, 9, 4, 5, 2, 3, 3, 5, 2]]
    assert batch.teacher.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 2, 3, 4, 5]]
    assert batch.teacher.predictor_index.tolist() == [2, 3, 4, 7, 8]
