"""Training samples: rollouts with score, teacher context and advantage."""

from __future__ import annotations

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
from sdpo.prompting.demonstrations import ScoredRollout, compute_success_rates
from sdpo.prompting.teacher_context import TeacherContext, build_teacher_contexts, compute_reprompt_metrics
from sdpo.prompting.tokenization import TeacherPrompt, Tokenizer
from sdpo.rewards.manager import RewardManager
from sdpo.trainer.data.prompts import Prompt


@dataclass(frozen=True)
class TrainingSample:
    """One rollout with everything the loss needs.

    Attributes:
        response: the sampled tokens and their log-probabilities.
        rollout: the response's text with its score and feedback.
        context: the teacher's prompt and what it shows.
        distillation_weight: factor of the sample's distillation term.
    """

    prompt: Prompt
    response: Completion
    rollout: ScoredRollout
    context: TeacherContext
    advantage: float
    distillation_weight: float

    @property
    def is_distilled(self) -> bool:
        return self.context.is_distilled

    @property
    def is_scored(self) -> bool:
        return self.rollout.is_scored

    @property
    def teacher_prompt(self) -> TeacherPrompt:
        return self.context.prompt


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
        ScoredRollout(group, text, output.score, output.feedback, prompts[group].solution)
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
        [prompts[rollout.group_id].row.prompt for rollout in scored],
        scored,
        [None if window is None else window - len(response.token_ids) for response in flat],
        config,
        rng,
    )
    scores = torch.tensor([rollout.score for rollout in scored], dtype=torch.float64)
    groups = torch.tensor([rollout.group_id for rollout in scored], dtype=torch.long)
    advantages = compute_group_advantages(scores, groups, norm_by_std=config.norm_adv_by_std_in_grpo).tolist()
    weights = [1.0] * len(scored)
    if config.weight_by_prompt_difficulty:
        rates = compute_success_rates(scored, config.success_reward_threshold)
        weights = compute_prompt_weights(torch.tensor(rates)).tolist()
    columns = zip(scored, flat, contexts, advantages, weights, strict=True)
    return [
        TrainingSample(
            prompt=prompts[rollout.group_id],
            response=response,
            rollout=rollout,
            context=context,
            advantage=advantage,
            distillation_weight=weight,
        )
        for rollout, response, context, advantage, weight in columns
    ]


def summarize_samples(samples: Sequence[TrainingSample], config: SelfDistillationConfig) -> dict[str, float]:
    """Compute the metrics of a step that depend on the rollouts only."""

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    scores = [s.rollout.score for s in samples if s.is_scored]
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
    groups = [s.rollout.group_id for s in samples]
    scored_groups = [s.rollout.group_id for s in samples if s.is_scored]
    for name, mean_of in (
        (metrics.SCORE_MEAN, ClusteredMean.of(scores, scored_groups)),
        (metrics.RESPONSE_LENGTH_MEAN, ClusteredMean.of(lengths, groups)),
    ):
        values |= name_interval(name, mean_of.normal_interval())
    truncated = ClusteredMean.of([not s.response.finished for s in samples], groups)
    values |= name_interval(metrics.RESPONSE_LENGTH_CLIP_RATIO, truncated.wilson_interval())
    values |= _summarize_repetition(samples)
    return values | compute_reprompt_metrics([s.rollout for s in samples], [s.context for s in samples], config)


def compute_repetition(token_ids: Sequence[int], length: int = 4) -> float | None:
    """Return the fraction of n-grams that repeat an earlier one, in [0, 1); None if there is no n-gram."""
    ngrams = [tuple(token_ids[i : i + length]) for i in range(len(token_ids) - length + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else None


def _summarize_repetition(samples: Sequence[TrainingSample]) -> dict[str, float]:
    repeated = ClusteredMean()
    for sample in samples:
        fraction = compute_repetition(sample.response.token_ids)
        if fraction is not None:
            repeated.add(sample.rollout.group_id, fraction, 1)
    if repeated.num_clusters == 0:
        return {}
    return {metrics.REPEATED_4GRAMS: repeated.mean} | name_interval(metrics.REPEATED_4GRAMS, repeated.wilson_interval())
