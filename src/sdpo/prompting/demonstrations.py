"""Which ground truth, successful peer response or feedback the teacher of a sample is shown."""

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
    """One rollout and what is known about it.

    Attributes:
        group: the same for all rollouts of one prompt.
        response: the decoded response.
        score: the grader's score; NaN where the grader failed.
        feedback: what the grader says about this response, if anything.
        ground_truth: the solution in the data row, if it has one.
    """

    group_id: int | str
    response: str
    score: float
    feedback: str | None = None
    ground_truth: str | None = None

    @property
    def is_scored(self) -> bool:
        """Whether anything is known of the response; if not, nothing is to be learned from it."""
        return not math.isnan(self.score)


@dataclass(frozen=True)
class PrivilegedContext:
    """What the teacher of one sample is shown besides the prompt; a blank text counts as none."""

    solution: str | None = None
    feedback: str | None = None
    is_from_peer: bool = False  # the solution is another rollout

    @property
    def is_empty(self) -> bool:
        """Whether the teacher knows no more than the student, so that the sample is not distilled."""
        return is_blank(self.solution) and is_blank(self.feedback)


def is_blank(text: str | None) -> bool:
    """Whether there is nothing to show: no text, or white space only."""
    return text is None or not text.strip()


def select_demonstrations(
    samples: Sequence[ScoredRollout], config: SelfDistillationConfig, rng: random.Random
) -> list[PrivilegedContext]:
    """Choose what each sample's teacher is shown, in the order of the samples.

    A peer is drawn uniformly from the successes (score >= ``success_reward_threshold``) of the sample's group that
    have text left after the removal of reasoning; the sample itself is among them only if
    ``dont_reprompt_on_self_success`` is false. A missing or blank ground truth is no solution. Reasoning is removed
    from peers and ground truths alike, since both may hold worked solutions; feedback is shown as it is. A response
    that was not scored is shown nothing and to nobody.

    The same samples, config and state of ``rng`` give the same choice. Numbers are drawn from ``rng`` for samples with
    a peer to choose only.

    After the official code (lasgroup/SDPO), which departs in this: it shows the first success of the group rather than
    a random one, so that all rollouts of a prompt are pulled towards one response, and it lets a success be its own
    demonstration unless told otherwise.
    """
    peers: dict[int | str, list[tuple[int, str]]] = defaultdict(list)
    if config.demonstration_source in ("successful_rollout", "successful_rollout_then_ground_truth"):
        for index, sample in enumerate(samples):
            text = _solution_text(sample.response, config)
            if text is not None and sample.score >= config.success_reward_threshold:
                peers[sample.group_id].append((index, text))
    return [_select(index, sample, peers[sample.group_id], config, rng) for index, sample in enumerate(samples)]


def compute_success_rates(samples: Sequence[ScoredRollout], threshold: float) -> list[float]:
    """The share of successes (score >= threshold) among the scored samples of each sample's group, in [0, 1].

    In the order of the samples; 0 where none was scored.
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


def _select_ground_truth(sample: ScoredRollout, config: SelfDistillationConfig) -> str | None:
    if config.demonstration_source in ("ground_truth", "successful_rollout_then_ground_truth"):
        return _solution_text(sample.ground_truth, config)
    return None


def _solution_text(text: str | None, config: SelfDistillationConfig) -> str | None:
    if text is not None and config.remove_thinking_from_demonstration:
        text = remove_thinking(text)
    return None if is_blank(text) else text
