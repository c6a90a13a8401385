"""A weight sync copies parameters bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sdpo.trainer.rollout.weight_sync import SharedWeights, compute_weight_checksum, copy_parameters

MakeModel = Callable[..., Any]


def assert_equal(one: torch.nn.Module, two: torch.nn.Module) -> None:
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_written_weights_are_read(make_model: MakeModel, dtype: torch.dtype, tied: bool) -> None:
    student = make_model(seed=0, dtype=dtype, tie_word_embeddings=tied)
    sampler = make_model(seed=1, dtype=dtype, tie_word_embeddings=tied)
    shared = SharedWeights(student)
    copy_parameters(shared.tensors, sampler)
    assert_equal(sampler, student)
    assert (sampler.lm_head.weight is sampler.get_input_embeddings().weight) == tied

    later = make_model(seed=2, dtype=dtype, tie_word_embeddings=tied)
    shared.write(later)
    assert_equal(sampler, student)  # until the next read
    copy_parameters(shared.tensors, sampler)
    assert_equal(sampler, later)
    assert all(p.requires_grad for p in sampler.parameters())


def test_shared_weights_are_a_copy(make_model: MakeModel) -> None:
    student, sampler = make_model(seed=0), make_model(seed=1)
    shared = SharedWeights(student)
    with torch.no_grad():
        for param in student.parameters():
            param.zero_()
    copy_parameters(shared.tensors, sampler)
    assert_equal(sampler, make_model(seed=0))
    assert all(tensor.is_shared() for tensor in shared.tensors.values())


def test_weights_of_another_architecture_are_refused(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match=r"parameters of different models: .*layers\.2"):
        copy_parameters(dict(make_model(num_hidden_layers=3).named_parameters()), make_model())


@pytest.mark.parametrize("training", [False, True])
def test_checksum_has_the_log_probs_of_the_student(make_model: MakeModel, training: bool) -> None:
    student = make_model(attention_dropout=0.5).train(training)
    checksum = compute_weight_checksum(student)
    assert student.training == training
    assert {0, student.config.vocab_size - 1} < set(checksum.token_ids)
    logits = student.eval()(input_ids=torch.tensor([checksum.token_ids])).logits[0].log_softmax(-1)
    expected = [logits[position, token_id].item() for position, token_id in enumerate(checksum.token_ids[1:])]
    assert checksum.log_probs == pytest.approx(expected)
    with torch.no_grad():
        student.lm_head.weight.mul_(1.5)
    assert compute_weight_checksum(student) != checksum
