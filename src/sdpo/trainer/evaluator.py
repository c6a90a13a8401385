"""Validation accuracy of the student, and of the teacher with its context from training."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from sdpo.algorithm.teacher import LogitMixture, Teacher
from sdpo.config.monitoring import EvalConfig
from sdpo.config.self_distillation import SelfDistillationConfig
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

# Every evaluation uses the same random numbers, so that two evaluations differ by the weights alone.
SEED = 20_601_20_802


@dataclass(frozen=True)
class Evaluator:
    """Scores greedy and sampled responses to validation prompts.

    Attributes:
        config: the section ``eval``.
        distillation: settings of the teacher context.
        prompts: validation prompts.
        sampling: stop tokens, length and batch size of the responses; ``config`` has n, temperature and top_p.
        window: maximum sequence length of the model; None if its config does not say.
    """

    config: EvalConfig
    distillation: SelfDistillationConfig
    reward_manager: RewardManager
    tokenizer: Tokenizer
    prompts: Sequence[Prompt]
    sampling: SamplingParams
    window: int | None
    vision: VisionAdapter | None = None

    def evaluate(self, student: nn.Module, teacher: Teacher | None) -> dict[str, float]:
        """Accuracy by data source: ``mean@1`` greedy, ``mean@n`` and ``best@n/mean`` (pass@n) of ``eval.n`` samples.

        Responses without a score are excluded and counted.
        """
        config = self.config
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
        sampling = replace(self.sampling, n=n, temperature=temperature, top_p=self.config.top_p)
        responses = sample_responses(policy, [p.tokens for p in self.prompts], sampling, SEED, self.vision)
        return score_responses(self.reward_manager, self.tokenizer, self.prompts, responses)

    def _evaluate_teacher(
        self, policy: LogitMixture, shown: Sequence[ScoredRollout], greedy: Sequence[ScoredRollout]
    ) -> dict[str, float]:
        """Greedy accuracy of the teacher with the context that training would give it for the student's responses.

        Each prompt's context is that of its first response with a demonstration or feedback. The difference to the
        student compares greedy responses to the same prompts.
        """
        contexts = self._build_contexts(shown)
        sources = [p.row.data_source for p in self.prompts]
        values = {
            teacher_prompted_name(source): sum(sources[group] == source for group in contexts) / sources.count(source)
            for source in dict.fromkeys(sources)
        }
        if not contexts:
            return values
        prompted = [self.prompts[group] for group in contexts]
        sampling = replace(self.sampling, n=1, temperature=0.0)
        responses = sample_responses(policy, list(contexts.values()), sampling, SEED, self.vision)
        scored = score_responses(self.reward_manager, self.tokenizer, prompted, responses)
        values |= _mean_by_source(prompted, scored, lambda source: teacher_val_name(source, "mean@1"))
        student = {g.group_id: g.score for g in greedy}
        gains = [replace(g, score=g.score - student[group]) for g, group in zip(scored, contexts, strict=True)]
        return values | _mean_by_source(prompted, gains, teacher_gain_name, is_difference=True)

    def _build_contexts(self, shown: Sequence[ScoredRollout]) -> dict[int, TokenPrompt]:
        """The teacher's prompt of each validation prompt that has one, by the prompt's index."""
        contexts: dict[int, TokenPrompt] = {}
        hints = select_demonstrations(shown, self.distillation, random.Random(SEED))
        room = None if self.window is None else self.window - self.sampling.max_new_tokens
        for response, hint in zip(shown, hints, strict=True):
            group = response.group_id
            if group in contexts or hint.is_empty:
                continue
            prompt = self.prompts[group]
            encoded = encode_teacher_prompt(self.tokenizer, prompt.row.prompt, hint, self.distillation, max_length=room)
            if encoded.token_ids is not None:
                contexts[group] = TokenPrompt(encoded.token_ids, prompt.images)
        return contexts


def _mean_by_source(
    prompts: Sequence[Prompt],
    scored: Sequence[ScoredRollout],
    name: Callable[[str], str],
    *,
    is_difference: bool = False,
) -> dict[str, float]:
    """Mean score and confidence interval by data source; the responses to a prompt count as one observation."""
    scores = defaultdict(list)
    for response in scored:
        if response.is_scored:
            scores[prompts[response.group_id].row.data_source].append(response)
    values: dict[str, float] = {}
    for source, of_source in scores.items():
        mean = ClusteredMean.of([r.score for r in of_source], [r.group_id for r in of_source])
        is_fraction = not is_difference and all(0 <= r.score <= 1 for r in of_source)
        interval = mean.wilson_interval() if is_fraction else mean.normal_interval()
        values |= {name(source): mean.mean} | name_interval(name(source), interval)
    return values


def _best_of_groups(scored: Sequence[ScoredRollout], n: int) -> list[ScoredRollout]:
    groups = [[g for g in scored[i : i + n] if g.is_scored] for i in range(0, len(scored), n)]
    return [max(group, key=lambda g: g.score) for group in groups if group]
