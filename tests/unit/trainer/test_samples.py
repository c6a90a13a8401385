"""Training samples of hand-written responses, with a real tokenizer."""

from __future__ import annotations

import random
from typing import Any

import pytest

from sdpo.config.data import RewardConfig
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.models.generation.sampling import Completion
from sdpo.observability import metrics
from sdpo.rewards.base import RewardOutput, Row, Task
from sdpo.rewards.manager import RewardManager
from sdpo.rewards.toy.hidden_rule import build_tokenizer
from sdpo.trainer.data.prompts import Prompt
from sdpo.trainer.data.samples import TrainingSample, build_samples, summarize_samples

TOKENIZER = build_tokenizer()
EOS = TOKENIZER.eos_token_id


class Exact:
    """Score 1 for the ground truth, 0.5 for its length, else 0; with feedback if requested."""

    def __init__(self, feedback: bool = False) -> None:
        self.feedback = feedback

    def compute_score(self, row: Row, response: str) -> RewardOutput:
        ground_truth = row.ground_truth or ""
        score = 1.0 if response == ground_truth else 0.5 * (len(response) == len(ground_truth))
        return RewardOutput(score, f"Expected: {ground_truth}" if self.feedback and score < 1 else None)


def reward_manager(task: Task) -> RewardManager:
    return RewardManager(task, RewardConfig(max_failure_fraction=0.5))


def prompt(text: str, ground_truth: str) -> Prompt:
    messages = [{"role": "user", "content": text}]
    ids = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    return Prompt(Row("x", messages, {"ground_truth": ground_truth}), list(ids), ground_truth)


def response(text: str, finished: bool = True) -> Completion:
    ids = [*TOKENIZER(text)["input_ids"], *([EOS] if finished else [])]
    return Completion(ids, [-1.0] * len(ids), finished)


PROMPTS = [prompt("12", "21"), prompt("345", "543")]
RESPONSES = [
    [response("21"), response("12"), response("7")],
    [response("543543", finished=False), response("1"), response("345")],
]


def build(task: Any = None, window: int | None = 128, seed: int = 0, **settings: Any) -> list[TrainingSample]:
    config = SelfDistillationConfig(**settings)
    return build_samples(
        reward_manager(task or Exact()), TOKENIZER, PROMPTS, RESPONSES, config, window, random.Random(seed)
    )


def test_samples_are_in_the_order_of_prompts_with_scores() -> None:
    samples = build()
    assert [s.rollout.response for s in samples] == ["21", "12", "7", "543543", "1", "345"]
    assert [s.rollout.score for s in samples] == [1, 0.5, 0, 0, 0, 0.5]
    assert [s.prompt for s in samples] == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    assert [s.response for s in samples] == RESPONSES[0] + RESPONSES[1]


def test_advantages_are_relative_to_the_group() -> None:
    unnormalized = [s.advantage for s in build(norm_adv_by_std_in_grpo=False)]
    assert unnormalized == pytest.approx([0.5, 0, -0.5, -1 / 6, -1 / 6, 1 / 3])
    normalized = [s.advantage for s in build()]
    deviation = 0.5  # sample standard deviation of 1, 0.5, 0
    assert normalized[:3] == pytest.approx([0.5 / deviation, 0, -0.5 / deviation], rel=1e-4)


def test_distillation_weights_by_prompt_difficulty() -> None:
    assert [s.distillation_weight for s in build()] == [1.0] * 6
    weights = [s.distillation_weight for s in build(weight_by_prompt_difficulty=True)]
    assert weights == pytest.approx([(1 / 3 * 2 / 3) ** 0.5] * 3 + [0] * 3)


def test_teacher_prompt_contains_the_demonstration() -> None:
    samples = build(demonstration_source="successful_rollout")
    assert [s.is_distilled for s in samples] == [False, True, True, False, False, False]
    for sample in samples[1:3]:
        assert sample.context.demonstration.solution == "21"
        text = TOKENIZER.decode(sample.teacher_prompt.token_ids)
        assert "Correct solution:\n\n21\n" in text
        assert text.endswith("<|im_start|>assistant\n")
    assert samples[0].teacher_prompt.token_ids is None
    ground_truth = build(demonstration_source="ground_truth")
    assert [s.context.demonstration.solution for s in ground_truth] == ["21"] * 3 + ["543"] * 3


def test_feedback_reaches_the_teacher_of_the_same_sample() -> None:
    samples = build(Exact(feedback=True), demonstration_source="none", include_environment_feedback=True)
    assert [s.context.demonstration.feedback for s in samples] == [None] + ["Expected: 21"] * 2 + ["Expected: 543"] * 3
    assert [s.is_distilled for s in samples] == [False] + [True] * 5


def test_grpo_builds_no_teacher_prompts() -> None:
    assert not any(s.is_distilled for s in build(Exact(feedback=True), policy_loss_weight=1.0))


def test_teacher_prompt_leaves_room_for_the_response_in_the_window() -> None:
    """A window that fits the teacher's prompt with a response of 4 tokens truncates it for one of 6 tokens."""
    complete = build(demonstration_source="ground_truth", window=None)
    size = len(complete[5].teacher_prompt.token_ids or []) + len(complete[5].response.token_ids)
    truncated = build(demonstration_source="ground_truth", window=size)
    assert truncated[5].teacher_prompt == complete[5].teacher_prompt
    assert len(complete[3].response.token_ids) == 6 and len(complete[5].response.token_ids) == 4
    assert truncated[3].teacher_prompt.truncated
    for sample in truncated:
        if sample.teacher_prompt.token_ids is not None:
            assert len(sample.teacher_prompt.token_ids) + len(sample.response.token_ids) <= size


def test_summary_of_six_samples() -> None:
    settings: dict[str, Any] = {
        "demonstration_source": "successful_rollout",
        "environment_feedback_only_without_solution": False,
    }
    config = SelfDistillationConfig(**settings, success_reward_threshold=1.0)
    samples = build(Exact(feedback=True), **settings)
    values = summarize_samples(samples, config)
    lengths = [3, 3, 2, 6, 2, 4]
    prompt_lengths = [10, 10, 10, 11, 11, 11]
    assert {name: value for name, value in values.items() if "/ci95_" not in name} == {
        metrics.REWARD_FAILURES: 0,
        metrics.SCORE_MEAN: pytest.approx(2 / 6),
        metrics.SCORE_MAX: 1,
        metrics.SCORE_MIN: 0,
        metrics.RESPONSE_LENGTH_MEAN: pytest.approx(sum(lengths) / 6),
        metrics.RESPONSE_LENGTH_MAX: 6,
        metrics.RESPONSE_LENGTH_CLIP_RATIO: pytest.approx(1 / 6),
        metrics.REPEATED_4GRAMS: 0,
        metrics.PROMPT_LENGTH_MEAN: pytest.approx(10.5),
        metrics.PROMPT_LENGTH_MAX: 11,
        metrics.TOKENS: sum(lengths) + sum(prompt_lengths),
        metrics.ROLLOUT_SUCCESS_FRACTION: pytest.approx(1 / 6),
        metrics.SUCCESS_GROUP_FRACTION: 0.5,
        metrics.REPROMPT_FRACTION: pytest.approx(5 / 6),
        metrics.SOLUTION_FRACTION: pytest.approx(2 / 6),
        metrics.SUCCESS_SAMPLE_FRACTION: pytest.approx(2 / 6),
        metrics.FEEDBACK_AVAILABLE_FRACTION: pytest.approx(5 / 6),
        metrics.FEEDBACK_FRACTION: pytest.approx(5 / 6),
        metrics.TRUNCATED_FRACTION: 0,
        metrics.OVERLONG_FRACTION: 0,
    }


def test_summary_counts_overlong_teacher_prompts() -> None:
    settings: dict[str, Any] = {"demonstration_source": "ground_truth", "max_reprompt_len": 10}
    values = summarize_samples(build(**settings), SelfDistillationConfig(**settings))
    assert values[metrics.OVERLONG_FRACTION] == 1
    assert values[metrics.REPROMPT_FRACTION] == 0


def test_repeated_prompt_in_a_batch_has_two_groups() -> None:
    """If a step has more prompts than the data has rows, each appearance of a row is a separate group."""
    config = SelfDistillationConfig()
    twice = [PROMPTS[0], PROMPTS[0]]
    samples = build_samples(reward_manager(Exact()), TOKENIZER, twice, RESPONSES, config, None, random.Random(0))
    assert [s.rollout.score for s in samples] == [1, 0.5, 0, 0, 0, 0]
    assert [round(s.advantage, 3) for s in samples[3:]] == [0, 0, 0]


class FailsOn:
    """Like ``Exact``, but raises on one response."""

    def __init__(self, text: str) -> None:
        self.text = text

    def compute_score(self, row: Row, response: str) -> RewardOutput:
        if response == self.text:
            raise ZeroDivisionError
        return Exact(feedback=True).compute_score(row, response)


def test_unscored_response_is_not_used() -> None:
    """Advantages, weights and demonstrations of the group exclude it."""
    settings: dict[str, Any] = {
        "demonstration_source": "successful_rollout_then_ground_truth",
        "include_environment_feedback": True,
        "weight_by_prompt_difficulty": True,
        "success_reward_threshold": 0.5,
        "dont_reprompt_on_self_success": False,
    }
    samples = build(FailsOn("12"), **settings)
    failed, others = samples[1], [samples[0], samples[2]]
    assert [s.is_scored for s in samples] == [True, False, True, True, True, True]
    assert (failed.is_distilled, failed.advantage, failed.rollout.feedback) == (False, 0.0, None)
    assert [s.context.demonstration.solution for s in others] == ["21", "21"]
    deviation = 0.5**0.5  # sample standard deviation of 1 and 0
    assert [s.advantage for s in others] == pytest.approx([0.5 / deviation, -0.5 / deviation], rel=1e-4)
    assert [s.distillation_weight for s in others] == [0.5, 0.5]  # success rate 1/2
    values = summarize_samples(samples, SelfDistillationConfig(**settings))
    assert values[metrics.REWARD_FAILURES] == 1
    assert values[metrics.SCORE_MEAN] == pytest.approx((1 + 0 + 0 + 0 + 0.5) / 5)
    assert values[metrics.ROLLOUT_SUCCESS_FRACTION] == pytest.approx(2 / 5)
    assert values[metrics.SUCCESS_GROUP_FRACTION] == 1
    assert values[metrics.REPROMPT_FRACTION] == pytest.approx(5 / 6)


def test_step_without_scored_responses_has_no_score_metrics() -> None:
    class FailingReward:
        def compute_score(self, row: Row, response: str) -> float:
            raise ZeroDivisionError

    tolerant = RewardManager(FailingReward(), RewardConfig(max_failure_fraction=1.0))
    config = SelfDistillationConfig()
    samples = build_samples(tolerant, TOKENIZER, PROMPTS, RESPONSES, config, None, random.Random(0))
    values = summarize_samples(samples, config)
    assert values[metrics.REWARD_FAILURES] == 6
    assert values[metrics.REPROMPT_FRACTION] == 0
    assert not {metrics.SCORE_MEAN, metrics.SCORE_MAX, metrics.SCORE_MIN, metrics.ROLLOUT_SUCCESS_FRACTION} & set(
        values
    )
    assert all(value == value for value in values.values())
