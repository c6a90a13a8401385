"""The teacher prompts of a step: chosen, encoded, counted. What both engines do between grading and learning."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sdpo import metrics
from sdpo.config import SelfDistillationConfig
from sdpo.context.demonstration import Demonstration, GradedResponse, select_demonstrations
from sdpo.context.encode import TeacherPrompt, Tokenizer, encode_teacher_prompt
from sdpo.context.reprompt import Message


@dataclass(frozen=True)
class Lesson:
    """What one rollout's teacher is shown, and the prompt that shows it."""

    demonstration: Demonstration
    prompt: TeacherPrompt

    @property
    def is_distilled(self) -> bool:
        return self.prompt.token_ids is not None


def build_lessons(
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[Message]],
    graded: Sequence[GradedResponse],
    max_lengths: Sequence[int | None],
    config: SelfDistillationConfig,
    rng: random.Random,
) -> list[Lesson]:
    """A lesson for each graded rollout of a step, in their order; empty ones where nothing is distilled at all.

    Args:
        prompts: each rollout's student prompt as messages.
        max_lengths: most tokens each teacher prompt may have besides ``max_reprompt_len``: the model's window minus the
            rollout's response.
        rng: decides among peers.
    """
    nothing = [Demonstration()] * len(graded)
    demonstrations = select_demonstrations(graded, config, rng) if config.distills else nothing
    return [
        Lesson(shown, encode_teacher_prompt(tokenizer, prompt, shown, config, max_length=room))
        for prompt, shown, room in zip(prompts, demonstrations, max_lengths, strict=True)
    ]


def summarize_lessons(
    graded: Sequence[GradedResponse], lessons: Sequence[Lesson], config: SelfDistillationConfig
) -> dict[str, float]:
    """Successes of a step, and how many of its rollouts are distilled, from what."""

    def share(flags: Sequence[bool]) -> float:
        return sum(flags) / len(flags)

    known = [g for g in graded if g.is_graded]
    succeeded = [g for g in known if g.score >= config.success_reward_threshold]
    values = {}
    if known:
        values = {
            metrics.SUCCESS_FRACTION: len(succeeded) / len(known),
            metrics.SUCCESS_GROUP_FRACTION: len({g.group for g in succeeded}) / len({g.group for g in known}),
        }
    if not config.distills:
        return values
    return values | {
        metrics.DISTILLED_FRACTION: share([x.is_distilled for x in lessons]),
        metrics.DEMONSTRATION_FRACTION: share(
            [x.is_distilled and x.demonstration.solution is not None for x in lessons]
        ),
        metrics.FEEDBACK_FRACTION: share([x.is_distilled and x.demonstration.feedback is not None for x in lessons]),
        metrics.TRUNCATED_FRACTION: share([x.prompt.truncated for x in lessons]),
        metrics.OVERLONG_FRACTION: share([x.prompt.overlong for x in lessons]),
    }
