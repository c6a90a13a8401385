"""Build the teacher contexts of a step, and compute metrics of them; shared by both backends."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.observability import metrics
from sdpo.observability.confidence import ClusteredMean, compute_wilson_interval, name_interval
from sdpo.prompting.demonstrations import PrivilegedContext, ScoredRollout, is_blank, select_demonstrations
from sdpo.prompting.templates import Message
from sdpo.prompting.tokenization import TeacherPrompt, Tokenizer, encode_teacher_prompt


@dataclass(frozen=True)
class TeacherContext:
    """The privileged context of a rollout's teacher, and the prompt that contains it."""

    demonstration: PrivilegedContext
    prompt: TeacherPrompt

    @property
    def is_distilled(self) -> bool:
        return self.prompt.token_ids is not None


def build_teacher_contexts(
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[Message]],
    rollouts: Sequence[ScoredRollout],
    max_lengths: Sequence[int | None],
    config: SelfDistillationConfig,
    rng: random.Random,
) -> list[TeacherContext]:
    """Build the teacher context of each rollout of a step; all are empty if the config does not distill.

    Args:
        prompts: the student's prompt of each rollout, as messages.
        max_lengths: a second limit of each teacher prompt besides ``max_reprompt_len``: the model's window minus the
            rollout's response; None for no limit.
        rng: selects among peers.
    """
    empty = [PrivilegedContext()] * len(rollouts)
    demonstrations = select_demonstrations(rollouts, config, rng) if config.distills else empty
    return [
        TeacherContext(
            demonstration, encode_teacher_prompt(tokenizer, prompt, demonstration, config, max_length=max_length)
        )
        for prompt, demonstration, max_length in zip(prompts, demonstrations, max_lengths, strict=True)
    ]


def compute_reprompt_metrics(
    rollouts: Sequence[ScoredRollout], contexts: Sequence[TeacherContext], config: SelfDistillationConfig
) -> dict[str, float]:
    """Compute the fractions of a step's rollouts that succeeded and that are distilled, by kind of demonstration.

    Names and quantities are those of the official implementation, which lacks ``rollout_success_fraction`` and
    ``solution_used_fraction``.
    """

    def fraction(flags: Sequence[bool]) -> float:
        return sum(flags) / len(flags)

    def interval(name: str, flags: Sequence[bool], clusters: Sequence[int]) -> dict[str, float]:
        return name_interval(name, ClusteredMean.of(flags, clusters).wilson_interval())

    scored = [rollout for rollout in rollouts if rollout.is_scored]
    succeeded = [rollout.score >= config.success_reward_threshold for rollout in scored]
    values: dict[str, float] = {}
    if scored:
        groups = {rollout.group_id for rollout in scored}
        solved = len({rollout.group_id for rollout, ok in zip(scored, succeeded, strict=True) if ok}) / len(groups)
        values = {metrics.ROLLOUT_SUCCESS_FRACTION: fraction(succeeded), metrics.SUCCESS_GROUP_FRACTION: solved}
        values |= interval(metrics.ROLLOUT_SUCCESS_FRACTION, succeeded, [rollout.group_id for rollout in scored])
        values |= name_interval(metrics.SUCCESS_GROUP_FRACTION, compute_wilson_interval(solved, len(groups)))
    if not config.distills:
        return values
    is_distilled = [x.is_distilled for x in contexts]
    values |= interval(metrics.REPROMPT_FRACTION, is_distilled, [rollout.group_id for rollout in rollouts])
    return values | {
        metrics.REPROMPT_FRACTION: fraction(is_distilled),
        metrics.SUCCESS_SAMPLE_FRACTION: fraction([x.is_distilled and x.demonstration.is_from_peer for x in contexts]),
        metrics.SOLUTION_FRACTION: fraction(
            [x.is_distilled and x.demonstration.solution is not None for x in contexts]
        ),
        metrics.FEEDBACK_AVAILABLE_FRACTION: fraction([not is_blank(rollout.feedback) for rollout in rollouts]),
        metrics.FEEDBACK_FRACTION: fraction(
            [x.is_distilled and x.demonstration.feedback is not None for x in contexts]
        ),
        metrics.TRUNCATED_FRACTION: fraction([x.prompt.truncated for x in contexts]),
        metrics.OVERLONG_FRACTION: fraction([x.prompt.overlong for x in contexts]),
    }
