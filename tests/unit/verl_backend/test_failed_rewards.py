"""Failed rewards: how workers record them and trainers exclude them."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl.experimental.agent_loop import agent_loop
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from sdpo.errors import SDPOError
from sdpo.observability import metrics
from sdpo.rewards.scoring import RewardFailure
from sdpo.verl_backend.driver.failed_rewards import (
    FAILURE,
    REFUSAL,
    FailedRewardsMixin,
    check_failures,
    correct_advantages,
    replace_scores,
)
from sdpo.verl_backend.rollout.agent_workers import EXTRA, OneStepOffWorker

CONFIG = OmegaConf.create(
    {
        "data": {"max_failure_fraction": 0.4},
        "algorithm": {"adv_estimator": "grpo", "norm_adv_by_std_in_grpo": True, "use_kl_in_reward": False},
    }
)
FAILED = {FAILURE: "sums: ZeroDivisionError: division by zero", REFUSAL: ""}
SCORED = {FAILURE: "", REFUSAL: ""}


# The workers


class Wrapped(Exception):
    """An error as Ray raises it in another process."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("a page of traceback")
        self.cause = cause


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> OneStepOffWorker:
    made = object.__new__(OneStepOffWorker)
    made.tokenizer = SimpleNamespace(eos_token_id=7)
    made.rollout_config = SimpleNamespace(calculate_log_probs=True)

    async def postprocess(output: AgentLoopOutput, validate: bool, **kwargs: Any) -> AgentLoopOutput:
        assert "agent_name" not in kwargs and kwargs["raw_prompt"] == "the prompt"
        return output

    monkeypatch.setattr(made, "_agent_loop_postprocess", postprocess)
    return made


def compute_score(worker: OneStepOffWorker, monkeypatch: pytest.MonkeyPatch, result: Any) -> AgentLoopOutput:
    """Return a response for which verl's worker computes this result or raises this error."""

    async def compute(self: Any, outputs: list[AgentLoopOutput], kwargs: Any) -> None:
        if isinstance(result, Exception):
            raise result
        outputs[-1].reward_score = result["score"]
        outputs[-1].extra_fields[EXTRA] = dict(result)

    monkeypatch.setattr(agent_loop.AgentLoopWorker, "_compute_score", compute)
    output = AgentLoopOutput(
        prompt_ids=[1], response_ids=[2], response_mask=[1], metrics=AgentLoopMetrics(), extra_fields={}
    )
    asyncio.run(worker._compute_score([output], {"data_source": "sums"}))
    return output


def test_scored_response_has_empty_failure_columns(worker: OneStepOffWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    output = compute_score(worker, monkeypatch, {"score": 0.5, "acc": 0.5, "feedback": "almost"})
    assert output.reward_score == 0.5
    assert output.extra_fields[EXTRA] == {"score": 0.5, "acc": 0.5, "feedback": "almost", **SCORED}


@pytest.mark.parametrize(
    ("error", "failure", "refusal"),
    [
        (Wrapped(RewardFailure("sums: no score within 30 seconds")), "sums: no score within 30 seconds", ""),
        (Wrapped(ZeroDivisionError("division by zero")), "sums: ZeroDivisionError: division by zero", ""),
        (KeyError("a"), "sums: KeyError: 'a'", ""),
        (Wrapped(SDPOError("no such language")), "no such language", "no such language"),
        ({"score": math.nan}, "sums: the reward must be a finite number, got nan", ""),
    ],
)
def test_exception_or_nonfinite_score_is_a_failed_reward(
    worker: OneStepOffWorker, monkeypatch: pytest.MonkeyPatch, error: Any, failure: str, refusal: str
) -> None:
    compute_score(worker, monkeypatch, {"score": 1.0, "acc": 1.0, "pred": "3"})
    output = compute_score(worker, monkeypatch, error)
    assert output.reward_score == 0.0
    # The columns of the other responses, without values.
    assert output.extra_fields[EXTRA] == {"score": None, "acc": None, "pred": None, FAILURE: failure, REFUSAL: refusal}


def test_exception_of_the_agent_loop_is_a_failed_reward(
    worker: OneStepOffWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(self: Any, *_: Any, **__: Any) -> None:
        raise RuntimeError("the tool is\nbroken")

    monkeypatch.setattr(agent_loop.AgentLoopWorker, "_run_agent_loop", run)
    output = asyncio.run(
        worker._run_agent_loop(
            {}, {"step": 3, "validate": False}, agent_name="any", data_source="sums", raw_prompt="the prompt"
        )
    )
    assert (output.response_ids, output.response_mask, output.response_logprobs) == ([7], [0], [0.0])
    assert output.reward_score == 0.0 and output.extra_fields["min_global_steps"] == 3
    assert output.extra_fields[EXTRA][FAILURE] == "sums: RuntimeError: the tool is broken"


def test_all_responses_have_the_same_columns(worker: OneStepOffWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_loop.AgentLoopWorker, "_postprocess", lambda self, inputs: inputs)
    rows = [SimpleNamespace(extra_fields={EXTRA: extra}) for extra in ({"acc": 1.0}, {"pred": "3"})]
    assert [row.extra_fields[EXTRA] for row in worker._postprocess(rows)] == [
        {"acc": 1.0, "pred": None},
        {"acc": None, "pred": "3"},
    ]


# The trainers


def test_failures_are_logged_and_an_error_above_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_failures([{}, SCORED, FAILED, SCORED, FAILED], CONFIG, "step 1") == [False, False, True, False, True]
    assert capsys.readouterr().out == (
        "data.task: scoring failed for 2 of 5 responses of step 1, which are left out; the last: sums: "
        "ZeroDivisionError: division by zero\n"
    )
    with pytest.raises(SDPOError, match=r"^data\.task: scoring failed for 1 of 2 responses of step 1, more than"):
        check_failures([SCORED, FAILED], CONFIG, "step 1")
    with pytest.raises(SDPOError, match=r"^no such language$"):
        check_failures([SCORED] * 9 + [{FAILURE: "no such language", REFUSAL: "no such language"}], CONFIG, "step 1")


def test_grpo_advantages_are_those_of_the_native_trainer() -> None:
    """A failed response is in no group; equal scores, and a response without others, have exactly 0."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.3, 66.7, 66.7, 66.7, 0.4])
    failed = [False, False, True, False, False, False, False, False]
    groups = ["a", "a", "a", "a", "b", "b", "b", "c"]
    masks = [torch.tensor([1, 0, 1][: 2 + i % 2]) for i in range(8)]
    stock = [9.0 * mask for mask in masks]
    tokens = correct_advantages(stock, masks, rewards, failed, groups, CONFIG)
    assert all(torch.equal(values != 0, (mask * values[0]).bool()) for values, mask in zip(tokens, masks, strict=True))
    own = torch.stack([values[0] for values in tokens])
    # Mean 13/30, deviations 17/30, -13/30, -4/30: their sample standard deviation is sqrt((289 + 169 + 16) / 1800).
    wanted = torch.tensor([17 / 30, -13 / 30, -4 / 30]) / ((289 + 169 + 16) / 1800) ** 0.5
    torch.testing.assert_close(own[[0, 1, 3]], wanted, rtol=1e-5, atol=0)
    assert own[[2, 4, 5, 6, 7]].tolist() == [0.0] * 5


def test_advantages_of_other_estimators_are_verl_s() -> None:
    config = OmegaConf.merge(CONFIG, {"algorithm": {"adv_estimator": "gae"}})
    stock = [torch.tensor([0.5, 2.0]), torch.tensor([3.0])]
    own = correct_advantages(stock, [torch.ones(2), torch.ones(1)], torch.ones(2), [False, True], ["a", "a"], config)
    assert [values.tolist() for values in own] == [[0.5, 2.0], [0.0]]


def test_score_metrics_exclude_failed_responses() -> None:
    values: dict[str, Any] = {"critic/score/mean": 0.1, "critic/rewards/mean": 0.1, "critic/score/min": 0.0}
    replace_scores(values, [0.5, math.nan, 1.0], CONFIG)
    assert values == {
        metrics.REWARD_FAILURES: 1,
        **{f"critic/{kind}/mean": 0.75 for kind in ("score", "rewards")},
        **{f"critic/{kind}/max": 1.0 for kind in ("score", "rewards")},
        **{f"critic/{kind}/min": 0.5 for kind in ("score", "rewards")},
    }
    values = {"critic/score/mean": 0.1}
    replace_scores(values, [0.1, 0.1], CONFIG)
    assert values == {"critic/score/mean": 0.1, metrics.REWARD_FAILURES: 0}
    replace_scores(values, [math.nan], CONFIG)
    assert values == {metrics.REWARD_FAILURES: 1}


@pytest.mark.parametrize("base", [RayPPOTrainer, PPOTrainer])
def test_validation_excludes_failed_rewards(base: type) -> None:
    hooks = dict.fromkeys(("on_sample_end", "on_step_end"))  # abstract in V1
    trainer = object.__new__(type("Trainer", (FailedRewardsMixin, base), hooks))
    trainer.config, trainer.global_steps = CONFIG, 3
    kwargs = {"expected_acc_counts": dict.fromkeys([("sums", uid) for uid in "abc"], 1)} if base is PPOTrainer else {}
    values = trainer._val_metrics_update(
        np.array(["sums"] * 3),
        ["a", "b", "c"],
        {
            "reward": [1.0, 0.0, 0.0],
            "acc": [1.0, None, 0.0],
            FAILURE: ["", "why", ""],
            REFUSAL: ["", "", ""],
        },
        [],
        **kwargs,
    )
    assert values["val-core/sums/acc/mean@1"] == 0.5 and values["val-aux/sums/reward/mean@1"] == 0.5
    assert values[metrics.VAL_REWARD_FAILURES] == 1
    with pytest.raises(SDPOError, match=r"3 of 3 responses of the validation at step 3"):
        trainer._val_metrics_update(["sums"] * 3, list("abc"), {FAILURE: ["why"] * 3}, [])
