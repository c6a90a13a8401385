"""Select the ground truth, successful rollout or feedback for each sample's teacher."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.prompting.reasoning import remove_thinking


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with its score and feedback.

    Attributes:
        group_id: number of the prompt in its batch, equal for all its rollouts.
        response: the decoded response.
        score: NaN if the reward function failed.
        feedback: the reward function's text about this response, if any.
        ground_truth: the solution in the data row, if any.
    """

    group_id: int
    response: str
    score: float
    feedback: str | None = None
    ground_truth: str | None = None

    @property
    def is_scored(self) -> bool:
        """Whether the reward function returned a score; if not, the sample is not trained on."""
        return not math.isnan(self.score)


@dataclass(frozen=True)
class PrivilegedContext:
    """What a sample's teacher is shown in addition to the prompt; a blank text counts as none."""

    solution: str | None = None
    feedback: str | None = None
    is_from_peer: bool = False  # whether the solution is a rollout of the group

    @property
    def is_empty(self) -> bool:
        """Whether the teacher sees no more than the student, so that the sample is not distilled."""
        return is_blank(self.solution) and is_blank(self.feedback)


def is_blank(text: str | None) -> bool:
    """Whether a text is missing or only white space."""
    return text is None or not text.strip()


def select_demonstrations(
    samples: Sequence[ScoredRollout], config: SelfDistillationConfig, rng: random.Random
) -> list[PrivilegedContext]:
    """Select the privileged context of each sample's teacher, in the order of the samples.

    A peer is drawn uniformly from the group's successful rollouts (score >= ``success_reward_threshold``) whose text is
    not blank after the removal of reasoning. The sample itself may be drawn only if ``dont_reprompt_on_self_success``
    is false. Reasoning is removed from peers and ground truths, since both may contain worked solutions; feedback is
    not changed. Responses without a score get no teacher context and are never used as demonstrations.

    The selection is deterministic for the same samples, config and state of ``rng``. ``rng`` is used only for samples
    with at least one peer.

    Source: the official code (lasgroup/SDPO), with two differences. It always shows the group's first success, so that
    all rollouts of a prompt are pulled towards one response. And by default a success is its own demonstration there.
    """
    peers: dict[int, list[tuple[int, str]]] = defaultdict(list)
    if config.demonstration_source in ("successful_rollout", "successful_rollout_then_ground_truth"):
        for index, sample in enumerate(samples):
            text = _solution_text(sample.response, config)
            if text is not None and sample.score >= config.success_reward_threshold:
                peers[sample.group_id].append((index, text))
    return [_select(index, sample, peers[sample.group_id], config, rng) for index, sample in enumerate(samples)]


def compute_success_rates(samples: Sequence[ScoredRollout], threshold: float) -> list[float]:
    """Compute the fraction of successes (score >= threshold) in each sample's group, in the order of the samples.

    Samples without a score do not count; without any score the fraction is 0.
    """
    num_scored = Counter(sample.group_id for sample in samples if sample.is_scored)
    num_successes = Counter(sample.group_id for sample in samples if sample.score >= threshold)
    return [num_successes[sample.group_id] / max(num_scored[sample.group_id], 1) for sample in samples]


def _select(
    index: int,
    sample: ScoredRollout,
    peers: Sequence[tuple[int, str]],
    config: SelfDistillationConfig,
    rng: random.Random,
) -> PrivilegedContext:
    if not sample.is_scored:
        return PrivilegedContext()
    if config.distill_only_failed and sample.score >= config.success_reward_threshold:
        return PrivilegedContext()
    peer = _select_peer(index, peers, config, rng)
    solution = peer or _select_ground_truth(sample, config)
    shows_feedback = config.include_environment_feedback and not is_blank(sample.feedback)
    if config.environment_feedback_only_without_solution and solution is not None:
        shows_feedback = False
    return PrivilegedContext(solution, sample.feedback if shows_feedback else None, is_from_peer=peer is not None)


def _select_peer(
    index: int, peers: Sequence[tuple[int, str]], config: SelfDistillationConfig, rng: random.Random
) -> str | None:
    candidates = [text for peer, text in peers if peer != index or not config.dont_reprompt_on_self_success]
    return rng.choice(candidates) if candidates else None


def shows_ground_truth(config: SelfDistillationConfig) -> bool:
    """Whether a teacher may be shown the solution in the data row."""
    return config.distills and config.demonstration_source.endswith("ground_truth")


def _select_ground_truth(sample: ScoredRollout, config: SelfDistillationConfig) -> str | None:
    if shows_ground_truth(config):
        return _solution_text(sample.ground_truth, config)
    return None


def _solution_text(text: str | None, config: SelfDistillationConfig) -> str | None:
    if text is not None and config.remove_thinking_from_demonstration:
        text = remove_thinking(text)
    return None if is_blank(text) else text
