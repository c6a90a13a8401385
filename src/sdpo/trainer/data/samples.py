"""Training samples: rollouts with score, teacher context and advantage."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sdpo.algorithm.advantage import compute_group_advantages
from sdpo.algorithm.aggregation import compute_prompt_weights
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.models.generation.sampling import Completion
from sdpo.observability import metrics
from sdpo.observability.confidence import ClusteredMean, name_interval
from sdpo.prompting.demonstrations import PrivilegedContext, ScoredRollout, compute_success_rates
from sdpo.prompting.teacher_context import TeacherContext, build_teacher_contexts, compute_reprompt_metrics
from sdpo.prompting.tokenization import TeacherPrompt, Tokenizer
from sdpo.rewards.base import RewardOutput
from sdpo.rewards.manager import RewardManager
from sdpo.trainer.data.prompts import Prompt


@dataclass(frozen=True)
class TrainingSample:
    """One rollout with everything the loss needs; the score is NaN if the reward function failed."""

    prompt: Prompt
    response: Completion
    text: str
    reward: RewardOutput
    demonstration: PrivilegedContext
    teacher_prompt: TeacherPrompt
    advantage: float
    distillation_weight: float

    @property
    def is_distilled(self) -> bool:
        return self.teacher_prompt.token_ids is not None

    @property
    def is_scored(self) -> bool:
        return not math.isnan(self.reward.score)


def score_responses(
    reward_manager: RewardManager,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[Completion]],
) -> list[ScoredRollout]:
    """Score every response, prompt by prompt; a rollout's group is the index of its prompt in the batch."""
    texts = [
        (group, tokenizer.decode(response.token_ids, skip_special_tokens=True))
        for group, group_responses in enumerate(responses)
        for response in group_responses
    ]
    rows = [prompt.row for prompt in prompts]
    outputs = reward_manager.compute_score([(rows[group], text) for group, text in texts])
    return [
        ScoredRollout(group, text, output.score, output.feedback, rows[group].ground_truth)
        for (group, text), output in zip(texts, outputs, strict=True)
    ]


def build_samples(
    reward_manager: RewardManager,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[Completion]],
    config: SelfDistillationConfig,
    window: int | None,
    rng: random.Random,
) -> list[TrainingSample]:
    """Score the rollouts of a step and build their samples, prompt by prompt."""
    scored = score_responses(reward_manager, tokenizer, prompts, responses)
    flat = [response for group_responses in responses for response in group_responses]
    contexts = build_teacher_contexts(
        tokenizer,
        [prompts[g.group_id].row.prompt for g in scored],
        scored,
        [None if window is None else window - len(response.token_ids) for response in flat],
        config,
        rng,
    )
    scores = torch.tensor([g.score for g in scored])
    groups = torch.tensor([g.group_id for g in scored])
    advantages = compute_group_advantages(scores, groups, norm_by_std=config.norm_adv_by_std_in_grpo).tolist()
    weights = [1.0] * len(scored)
    if config.weight_by_prompt_difficulty:
        rates = compute_success_rates(scored, config.success_reward_threshold)
        weights = compute_prompt_weights(torch.tensor(rates)).tolist()
    return [
        TrainingSample(
            prompt=prompts[g.group_id],
            response=response,
            text=g.response,
            reward=RewardOutput(g.score, g.feedback),
            demonstration=context.demonstration,
            teacher_prompt=context.prompt,
            advantage=advantage,
            distillation_weight=weight,
        )
        for g, response, context, advantage, weight in zip(scored, flat, contexts, advantages, weights, strict=True)
    ]


def summarize_samples(samples: Sequence[TrainingSample], config: SelfDistillationConfig) -> dict[str, float]:
    """Compute the metrics of a step that depend on the rollouts only."""

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    scores = [s.reward.score for s in samples if s.is_scored]
    lengths = [len(s.response.token_ids) for s in samples]
    prompt_lengths = [len(s.prompt.token_ids) for s in samples]
    values = {
        metrics.REWARD_FAILURES: len(samples) - len(scores),
        metrics.RESPONSE_LENGTH_MEAN: mean(lengths),
        metrics.RESPONSE_LENGTH_MAX: max(lengths),
        metrics.RESPONSE_LENGTH_CLIP_RATIO: mean([not s.response.finished for s in samples]),
        metrics.PROMPT_LENGTH_MEAN: mean(prompt_lengths),
        metrics.PROMPT_LENGTH_MAX: max(prompt_lengths),
        metrics.TOKENS: sum(lengths) + sum(prompt_lengths),
    }
    if scores:
        values |= {
            metrics.SCORE_MEAN: mean(scores),
            metrics.SCORE_MAX: max(scores),
            metrics.SCORE_MIN: min(scores),
        }
    prompts = [id(s.prompt) for s in samples]
    scored_prompts = [id(s.prompt) for s in samples if s.is_scored]
    for name, mean_of in (
        (metrics.SCORE_MEAN, ClusteredMean.of(scores, scored_prompts)),
        (metrics.RESPONSE_LENGTH_MEAN, ClusteredMean.of(lengths, prompts)),
    ):
        values |= name_interval(name, mean_of.normal_interval())
    truncated = ClusteredMean.of([not s.response.finished for s in samples], prompts)
    values |= name_interval(metrics.RESPONSE_LENGTH_CLIP_RATIO, truncated.wilson_interval())
    values |= _summarize_repetition(samples)
    scored = [ScoredRollout(id(s.prompt), s.text, s.reward.score, s.reward.feedback) for s in samples]
    contexts = [TeacherContext(s.demonstration, s.teacher_prompt) for s in samples]
    return values | compute_reprompt_metrics(scored, contexts, config)


def compute_repetition(token_ids: Sequence[int], length: int = 4) -> float | None:
    """Return the fraction of n-grams that repeat an earlier one, in [0, 1); None if there is no n-gram."""
    ngrams = [tuple(token_ids[i : i + length]) for i in range(len(token_ids) - length + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else None


def _summarize_repetition(samples: Sequence[TrainingSample]) -> dict[str, float]:
    repeated = ClusteredMean()
    for sample in samples:
        fraction = compute_repetition(sample.response.token_ids)
        if fraction is not None:
            repeated.add(id(sample.prompt), fraction, 1)
    if repeated.num_clusters == 0:
        return {}
    return {metrics.REPEATED_4GRAMS: repeated.mean} | name_interval(metrics.REPEATED_4GRAMS, repeated.wilson_interval())
