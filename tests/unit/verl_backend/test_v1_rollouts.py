"""Rollouts that V1 trainers read from verl's queue: padding is excluded, missing rollouts are an error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from transfer_queue import KVBatchMeta

from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.errors import SDPOError
from sdpo.verl_backend.driver import v1_trainers
from sdpo.verl_backend.driver.failed_rewards import FAILURE, REFUSAL
from sdpo.verl_backend.driver.teacher_batch import TeacherBatchBuilder
from sdpo.verl_backend.driver.v1_trainers import SelfDistillationSyncTrainer

FAILED = {FAILURE: "a reward function: ZeroDivisionError", REFUSAL: ""}
SCORED = {FAILURE: "", REFUSAL: "", "feedback": "1 is wrong"}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Reads the rollouts of two prompts, two each, from keys of verl's form, ``UID_SESSION_TURN``."""

    def read(keys: list[str], extras: list[dict[str, str]]) -> list[Any]:
        trainer = object.__new__(SelfDistillationSyncTrainer)
        trainer.global_steps, trainer.parameter_sync_step = 3, 1
        trainer.config = OmegaConf.create(
            {
                "data": {"train_batch_size": 2, "max_failure_fraction": 0.5},
                "actor_rollout_ref": {"rollout": {"n": 2}},
            }
        )
        trainer.teacher_batch = TeacherBatchBuilder(SelfDistillationConfig(), None, None, 0, 1)
        count = len(keys)

        def jagged(value: float) -> torch.Tensor:
            return torch.nested.nested_tensor([torch.full((i + 1,), value) for i in range(count)], layout=torch.jagged)

        data = {
            "uid": [key.partition("_")[0] for key in keys],
            "raw_prompt": [[{"role": "user", "content": "?"}]] * count,
            "responses": jagged(7.0),
            "response_mask": jagged(1.0),
            "rm_scores": jagged(0.5),
            "reward_model": [{"ground_truth": "2"}] * count,
            "extra_info": [{}] * count,
            "extra_fields": [{"reward_extra_info": extra} for extra in extras],
        }
        monkeypatch.setattr(v1_trainers.tq, "kv_batch_get", lambda **_: data)

        tags = [{"is_padding": key.startswith("pad")} for key in keys]
        return trainer._read_rollouts(KVBatchMeta(keys=keys, tags=tags, partition_id="train"))

    return read


def test_padding_is_no_rollout_and_is_not_counted_among_failures(read: Callable[..., list[Any]]) -> None:
    keys = ["a_0_0", "a_1_0", "pad_0_0", "b_0_0", "b_1_0", "pad_1_0"]
    # Three of four rollouts have a score; the padding's failures would exceed the limit.
    rollouts = read(keys, [SCORED, FAILED, FAILED, SCORED, SCORED, FAILED])
    assert [None if rollout is None else rollout.uid for rollout in rollouts] == ["a", "a", None, "b", "b", None]
    assert [rollout.score for rollout in rollouts if rollout is not None] == pytest.approx(
        [0.5, math.nan, 2.0, 2.5], nan_ok=True
    )
    assert rollouts[3] == v1_trainers.Rollout(
        uid="b",
        messages=[{"role": "user", "content": "?"}],
        response_ids=[7.0] * 4,
        response_mask=[1.0] * 4,
        score=2.0,
        feedback="1 is wrong",
        ground_truth="2",
    )


def test_missing_rollout_is_an_error(read: Callable[..., list[Any]]) -> None:
    with pytest.raises(RuntimeError, match="step 3: 1 of 4 rollouts are missing; see the log of verl's agent loop"):
        read(["a_0_0", "a_1_0", "b_1_0", "pad_0_0"], [SCORED] * 4)
    # A rollout of several turns has several rows.
    assert len(read(["a_0_0", "a_0_1", "a_1_0", "b_0_0", "b_1_0"], [SCORED] * 5)) == 5


def test_too_many_failures_are_an_error(read: Callable[..., list[Any]]) -> None:
    with pytest.raises(SDPOError, match="scoring failed for 3 of 4 responses of step 3"):
        read(["a_0_0", "a_1_0", "b_0_0", "b_1_0", "pad_0_0"], [FAILED, FAILED, FAILED, SCORED, SCORED])
