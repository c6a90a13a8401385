"""Held-out accuracy of the student, and of the teacher as it is prompted in training."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from sdpo.algorithm.teacher import LogitMixture, Teacher
from sdpo.config.root import SDPOConfig
from sdpo.models.generation.sampling import SamplingParams, sample_responses
from sdpo.models.multimodal.processor import TokenPrompt
from sdpo.models.multimodal.vision_tower import VisionAdapter
from sdpo.observability.confidence import ClusteredMean, name_interval
from sdpo.observability.metrics import (
    VAL_REWARD_FAILURES,
    teacher_gain_name,
    teacher_prompted_name,
    teacher_val_name,
    val_name,
)
from sdpo.prompting.demonstrations import ScoredRollout, select_demonstrations
from sdpo.prompting.tokenization import Tokenizer, encode_teacher_prompt
from sdpo.rewards.manager import RewardManager
from sdpo.trainer.data.prompts import Prompt
from sdpo.trainer.data.samples import score_responses

# Evaluation draws the same noise every time, so that two of them differ by the weights alone.
SEED = 20_601_20_802


@dataclass(frozen=True)
class Evaluator:
    """Grades greedy and sampled responses to held-out prompts."""

    run: SDPOConfig
    reward_manager: RewardManager
    tokenizer: Tokenizer
    prompts: Sequence[Prompt]
    decoding: SamplingParams
    window: int | None
    vision: VisionAdapter | None = None

    def evaluate(self, student: nn.Module, teacher: Teacher | None) -> dict[str, float]:
        """Accuracy by data source: ``mean@1`` greedy, ``mean@n`` and ``best@n/mean`` (pass@n) of ``eval.n`` samples.

        Responses that could not be scored are left out and counted.
        """
        config = self.run.eval
        failures_before = self.reward_manager.num_failures
        policy: LogitMixture = [(student, 1.0)]
        greedy = self._respond(policy, n=1, temperature=0.0)
        values = _mean_by_source(self.prompts, greedy, lambda source: val_name(source, "mean@1"))
        shown = greedy
        if config.n > 0:
            shown = self._respond(policy, n=config.n, temperature=config.temperature)
            best = _best_of_groups(shown, config.n)
            values |= _mean_by_source(self.prompts, shown, lambda source: val_name(source, f"mean@{config.n}"))
            values |= _mean_by_source(self.prompts, best, lambda source: val_name(source, f"best@{config.n}/mean"))
        if teacher is not None and config.evaluate_teacher:
            values |= self._evaluate_teacher(teacher.policy(student), shown, greedy)
        return values | {VAL_REWARD_FAILURES: self.reward_manager.num_failures - failures_before}

    def _respond(self, policy: LogitMixture, n: int, temperature: float) -> list[ScoredRollout]:
        decoding = replace(self.decoding, n=n, temperature=temperature, top_p=self.run.eval.top_p)
        responses = sample_responses(policy, [p.tokens for p in self.prompts], decoding, SEED, self.vision)
        return score_responses(self.reward_manager, self.tokenizer, self.prompts, responses)

    def _evaluate_teacher(
        self, policy: LogitMixture, shown: Sequence[ScoredRollout], greedy: Sequence[ScoredRollout]
    ) -> dict[str, float]:
        """Greedy accuracy of the teacher, shown what training would show it of the student's responses.

        The first response of each prompt that gets a demonstration or feedback speaks for its prompt. Its gain is over
        the student's greedy responses to the same prompts.
        """
        config = self.run.self_distillation
        demonstrations = select_demonstrations(shown, config, random.Random(SEED))
        contexts: dict[int, TokenPrompt] = {}
        for response, demonstration in zip(shown, demonstrations, strict=True):
            group = int(response.group_id)
            if group in contexts or demonstration.is_empty:
                continue
            room = None if self.window is None else self.window - self.decoding.max_new_tokens
            encoded = encode_teacher_prompt(
                self.tokenizer, self.prompts[group].row.prompt, demonstration, config, max_length=room
            )
            if encoded.token_ids is not None:
                contexts[group] = TokenPrompt(encoded.token_ids, self.prompts[group].images)
        sources = [p.row.data_source for p in self.prompts]
        prompted = [self.prompts[group] for group in contexts]
        values = {
            teacher_prompted_name(source): sum(sources[group] == source for group in contexts) / sources.count(source)
            for source in dict.fromkeys(sources)
        }
        if prompted:
            decoding = replace(self.decoding, n=1, temperature=0.0)
            responses = sample_responses(policy, list(contexts.values()), decoding, SEED, self.vision)
            scored = score_responses(self.reward_manager, self.tokenizer, prompted, responses)
            values |= _mean_by_source(prompted, scored, lambda source: teacher_val_name(source, "mean@1"))
            student = {int(g.group_id): g.score for g in greedy}
            gains = [replace(g, score=g.score - student[group]) for g, group in zip(scored, contexts, strict=True)]
            values |= _mean_by_source(prompted, gains, teacher_gain_name, is_difference=True)
        return values


def _mean_by_source(
    prompts: Sequence[Prompt],
    scored: Sequence[ScoredRollout],
    name: Callable[[str], str],
    *,
    is_difference: bool = False,
) -> dict[str, float]:
    """Means and their intervals; a prompt is one observation."""
    scores = defaultdict(list)
    for response in scored:
        if response.is_scored:
            scores[prompts[int(response.group_id)].row.data_source].append(response)
    values: dict[str, float] = {}
    for source, of_source in scores.items():
        mean = ClusteredMean.of([r.score for r in of_source], [r.group_id for r in of_source])
        is_share = not is_difference and all(0 <= r.score <= 1 for r in of_source)
        interval = mean.wilson_interval() if is_share else mean.normal_interval()
        values |= {name(source): mean.mean} | name_interval(name(source), interval)
    return values


def _best_of_groups(scored: Sequence[ScoredRollout], n: int) -> list[ScoredRollout]:
    groups = [[g for g in scored[i : i + n] if g.is_scored] for i in range(0, len(scored), n)]
    return [max(group, key=lambda g: g.score) for group in groups if group]
