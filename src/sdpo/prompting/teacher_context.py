"""The teacher prompts of a step: chosen, encoded, counted. What both engines do between grading and learning."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.observability import metrics
from sdpo.observability.confidence import ClusteredMean, compute_wilson_interval, name_interval
from sdpo.prompting.demonstrations import PrivilegedContext, ScoredRollout, is_blank, select_demonstrations
from sdpo.prompting.templates import Message
from sdpo.prompting.tokenization import TeacherPrompt, Tokenizer, encode_teacher_prompt


@dataclass(frozen=True)
class TeacherContext:
    """What one rollout's teacher is shown, and the prompt that shows it."""

    demonstration: PrivilegedContext
    prompt: TeacherPrompt

    @property
    def is_distilled(self) -> bool:
        return self.prompt.token_ids is not None


def build_teacher_contexts(
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[Message]],
    scored: Sequence[ScoredRollout],
    max_lengths: Sequence[int | None],
    config: SelfDistillationConfig,
    rng: random.Random,
) -> list[TeacherContext]:
    """A lesson for each scored rollout of a step, in their order; empty ones where nothing is distilled at all.

    Args:
        prompts: each rollout's student prompt as messages.
        max_lengths: most tokens each teacher prompt may have besides ``max_reprompt_len``: the model's window minus the
            rollout's response.
        rng: decides among peers.
    """
    nothing = [PrivilegedContext()] * len(scored)
    demonstrations = select_demonstrations(scored, config, rng) if config.distills else nothing
    return [
        TeacherContext(shown, encode_teacher_prompt(tokenizer, prompt, shown, config, max_length=room))
        for prompt, shown, room in zip(prompts, demonstrations, max_lengths, strict=True)
    ]


def compute_reprompt_metrics(
    scored: Sequence[ScoredRollout], contexts: Sequence[TeacherContext], config: SelfDistillationConfig
) -> dict[str, float]:
    """Fractions of a step's rollouts: that succeeded, that are distilled, and by which kind of demonstration.

    Names and quantities of the official implementation, except ``rollout_success_fraction`` and
    ``solution_used_fraction``, which it does not have.
    """

    def fraction(flags: Sequence[bool]) -> float:
        return sum(flags) / len(flags)

    def interval(name: str, flags: Sequence[bool], clusters: Sequence[Hashable]) -> dict[str, float]:
        return name_interval(name, ClusteredMean.of(flags, clusters).wilson_interval())

    known = [g for g in scored if g.is_scored]
    succeeded = [g.score >= config.success_reward_threshold for g in known]
    values: dict[str, float] = {}
    if known:
        groups = {g.group_id for g in known}
        solved = len({g.group_id for g, ok in zip(known, succeeded, strict=True) if ok}) / len(groups)
        values = {metrics.ROLLOUT_SUCCESS_FRACTION: fraction(succeeded), metrics.SUCCESS_GROUP_FRACTION: solved}
        values |= interval(metrics.ROLLOUT_SUCCESS_FRACTION, succeeded, [g.group_id for g in known])
        values |= name_interval(metrics.SUCCESS_GROUP_FRACTION, compute_wilson_interval(solved, len(groups)))
    if not config.distills:
        return values
    is_distilled = [x.is_distilled for x in contexts]
    values |= interval(metrics.REPROMPT_FRACTION, is_distilled, [g.group_id for g in scored])
    return values | {
        metrics.REPROMPT_FRACTION: fraction(is_distilled),
        metrics.SUCCESS_SAMPLE_FRACTION: fraction([x.is_distilled and x.demonstration.is_from_peer for x in contexts]),
        metrics.SOLUTION_FRACTION: fraction(
            [x.is_distilled and x.demonstration.solution is not None for x in contexts]
        ),
        metrics.FEEDBACK_AVAILABLE_FRACTION: fraction([not is_blank(g.feedback) for g in scored]),
        metrics.FEEDBACK_FRACTION: fraction(
            [x.is_distilled and x.demonstration.feedback is not None for x in contexts]
        ),
        metrics.TRUNCATED_FRACTION: fraction([x.prompt.truncated for x in contexts]),
        metrics.OVERLONG_FRACTION: fraction([x.prompt.overlong for x in contexts]),
    }
