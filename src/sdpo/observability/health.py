"""Health checks over training metrics: detect a collapse, give the reason and the action to take.

A check compares the mean of the last ``health.window`` steps with an earlier mean: the best so far, or that of the
first window. It fails if the change exceeds the check's own threshold and is significant, larger than
``health.min_z_score`` standard errors. A failure is reported once, when it begins; a check that has passed for a full
window may be reported again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sdpo.config.monitoring import HealthConfig
from sdpo.observability import metrics


@dataclass(frozen=True)
class HealthEvent:
    """A health check that begins to fail.

    Attributes:
        step: training step of the failure.
        rule: name of the check, which is also the name of the setting with its action.
        action: ``warn``, ``reduce_weight``, ``freeze_teacher`` or ``stop``.
        reason: one sentence with the numbers.
        values: the numbers in ``reason``, by metric.
    """

    step: int
    rule: str
    action: str
    reason: str
    values: Mapping[str, float]


class Violation(NamedTuple):
    """Why a check fails."""

    reason: str
    values: dict[str, float]


class RollingMean:
    """Mean of a metric over the last steps, with the extremes of this mean so far.

    Attributes:
        first: mean of the first ``window`` steps; None until then.
        lowest, highest: extremes of the means of ``window`` steps so far.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.first: float | None = None
        self.lowest = math.inf
        self.highest = -math.inf
        self._recent: list[float] = []
        self._count = 0
        self._squares = 0.0  # sum of squared differences between consecutive steps

    def add(self, value: float) -> None:
        if self._recent:
            self._squares += (value - self._recent[-1]) ** 2
        self._recent = [*self._recent, value][-self.window :]
        self._count += 1
        if len(self._recent) < self.window:
            return
        if self.first is None:
            self.first = self.mean
        self.lowest, self.highest = min(self.lowest, self.mean), max(self.highest, self.mean)

    @property
    def is_ready(self) -> bool:
        """Whether the first and the last window are disjoint."""
        return self._count >= 2 * self.window

    @property
    def mean(self) -> float:
        """Mean of the last steps; NaN before the first step."""
        return sum(self._recent) / len(self._recent) if self._recent else math.nan

    @property
    def standard_error(self) -> float:
        """Standard error of the difference between two means of ``window`` steps without a trend.

        The variance of a step is estimated as half the mean squared difference between consecutive steps, which a
        trend hardly changes. Source: von Neumann, Annals of Mathematical Statistics 12 (1941).
        """
        variance = self._squares / (2 * max(1, self._count - 1))
        return math.sqrt(2 * variance / self.window)

    def state_dict(self) -> dict[str, Any]:
        # JSON has no infinities.
        extremes = {"lowest": self.lowest, "highest": self.highest} if self.first is not None else {}
        return {"first": self.first, "recent": self._recent, "count": self._count, "squares": self._squares, **extremes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.first, self._recent = state["first"], list(state["recent"])
        self._count, self._squares = state["count"], state["squares"]
        self.lowest, self.highest = state.get("lowest", math.inf), state.get("highest", -math.inf)


class HealthMonitor:
    """Runs all health checks on the metrics of each step, in order."""

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self.num_events = 0
        self._means = {name: RollingMean(config.window) for name in _WATCHED}
        self._gains: dict[str, tuple[float, float]] = {}  # data source -> teacher's last gain, upper end of interval
        self._steps_since_violation: dict[str, int] = {}  # by reported check, until it has passed for a window
        self._checks: dict[str, Callable[[], Violation | None]] = {
            "score_collapse": self._score_collapse,
            "entropy_collapse": self._entropy_collapse,
            "entropy_explosion": self._entropy_explosion,
            "length_collapse": self._length_collapse,
            "teacher_entropy_increase": self._teacher_entropy_increase,
            "teacher_underperforms_student": self._teacher_underperforms_student,
            "no_distillation_targets": self._no_distillation_targets,
        }

    def check(self, step: int, values: Mapping[str, float]) -> list[HealthEvent]:
        """Add the metrics of a step and return the checks that begin to fail.

        Missing and non-finite values are skipped; a check without its metric passes.
        """
        for name, mean in self._means.items():
            if math.isfinite(values.get(name, math.nan)):
                mean.add(float(values[name]))
        self._gains |= _find_gains(values)
        events = []
        for name, check in self._checks.items():
            action = getattr(self.config, name)
            violation = check() if action != "ignore" else None
            if violation is not None and name not in self._steps_since_violation:
                events.append(HealthEvent(step, name, action, violation.reason, violation.values))
            self._update_episode(name, fails=violation is not None)
        self.num_events += len(events)
        return events

    def state_dict(self) -> dict[str, Any]:
        """The complete state, in JSON's types."""
        return {
            "num_events": self.num_events,
            "gains": {source: list(gain) for source, gain in self._gains.items()},
            "steps_since_violation": dict(self._steps_since_violation),
            "means": {name: mean.state_dict() for name, mean in self._means.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from the state of a monitor with the same settings."""
        self.num_events = state["num_events"]
        self._gains = {source: (gain, high) for source, (gain, high) in state["gains"].items()}
        self._steps_since_violation = dict(state["steps_since_violation"])
        for name, mean in self._means.items():
            mean.load_state_dict(state["means"][name])

    def _update_episode(self, check: str, fails: bool) -> None:
        """Begin or extend an episode of failures; it ends after a window of passes."""
        if fails:
            self._steps_since_violation[check] = 0
        elif check in self._steps_since_violation:
            self._steps_since_violation[check] += 1
            if self._steps_since_violation[check] >= self.config.window:
                del self._steps_since_violation[check]

    def _score_collapse(self) -> Violation | None:
        score = self._means[metrics.SCORE_MEAN]
        drop = score.highest - score.mean
        if not score.is_ready or drop <= self.config.score_drop * abs(score.highest):
            return None
        if not self._is_significant(drop, score):
            return None
        return self._describe("training score fell from", score.highest, score.mean, metrics.SCORE_MEAN)

    def _entropy_collapse(self) -> Violation | None:
        entropy = self._means[metrics.ENTROPY]
        if not entropy.is_ready or entropy.first is None or self._score_has_risen():
            return None
        fall = entropy.first - entropy.mean
        if entropy.mean >= self.config.entropy_fall * entropy.first or not self._is_significant(fall, entropy):
            return None
        return self._describe(
            "entropy fell, and the score did not rise, from", entropy.first, entropy.mean, metrics.ENTROPY
        )

    def _entropy_explosion(self) -> Violation | None:
        return self._check_rise(metrics.ENTROPY, self.config.entropy_rise, "entropy rose from")

    def _teacher_entropy_increase(self) -> Violation | None:
        # The teacher sees the answer; if its entropy rises nevertheless, its weights have degraded.
        return self._check_rise(
            metrics.TEACHER_ENTROPY, self.config.teacher_entropy_rise, "the teacher's entropy rose from"
        )

    def _check_rise(self, metric: str, max_factor: float, change: str) -> Violation | None:
        rolling = self._means[metric]
        if not rolling.is_ready or rolling.mean <= max_factor * rolling.lowest:
            return None
        if not self._is_significant(rolling.mean - rolling.lowest, rolling):
            return None
        return self._describe(change, rolling.lowest, rolling.mean, metric)

    def _length_collapse(self) -> Violation | None:
        length, clipped = (
            self._means[name] for name in (metrics.RESPONSE_LENGTH_MEAN, metrics.RESPONSE_LENGTH_CLIP_RATIO)
        )
        if length.is_ready and length.first is not None and not self._score_has_risen():
            fell = length.mean < self.config.length_fall * length.first
            if fell and self._is_significant(length.first - length.mean, length):
                change = "response length fell, and the score did not rise, from"
                return self._describe(change, length.first, length.mean, metrics.RESPONSE_LENGTH_MEAN)
        rise = clipped.mean - clipped.lowest if clipped.is_ready else 0.0
        if rise > self.config.max_clip_ratio_increase and self._is_significant(rise, clipped):
            change = "fraction of truncated responses rose from"
            return self._describe(change, clipped.lowest, clipped.mean, metrics.RESPONSE_LENGTH_CLIP_RATIO)
        return None

    def _teacher_underperforms_student(self) -> Violation | None:
        for source, (gain, high) in self._gains.items():
            if high < -self.config.min_accuracy_gap:
                name = metrics.teacher_gain_name(source)
                reason = (
                    f"validation accuracy of the teacher on {source} is {-gain:.3g} below the student's, at least "
                    f"{-high:.3g} with 95 % confidence"
                )
                return Violation(reason, {name: gain, metrics.ci95_names(name)[1]: high})
        return None

    def _no_distillation_targets(self) -> Violation | None:
        distilled, succeeded = (
            self._means[name] for name in (metrics.REPROMPT_FRACTION, metrics.ROLLOUT_SUCCESS_FRACTION)
        )
        if not distilled.is_ready or not succeeded.is_ready or distilled.mean > self.config.min_distilled_fraction:
            return None
        if succeeded.mean >= 1 - self.config.min_distilled_fraction:
            return None  # all rollouts succeed, so a teacher that is shown only failures has no context
        reason = (
            f"{distilled.mean:.3g} of the samples were distilled in the last {self.config.window} steps, though only "
            f"{succeeded.mean:.3g} succeeded"
        )
        return Violation(
            reason, {metrics.REPROMPT_FRACTION: distilled.mean, metrics.ROLLOUT_SUCCESS_FRACTION: succeeded.mean}
        )

    def _score_has_risen(self) -> bool:
        """Whether the score is above its first window, which makes low entropy and short responses healthy."""
        score = self._means[metrics.SCORE_MEAN]
        return score.is_ready and score.first is not None and self._is_significant(score.mean - score.first, score)

    def _is_significant(self, difference: float, rolling: RollingMean) -> bool:
        return difference > self.config.min_z_score * rolling.standard_error

    def _describe(self, change: str, before: float, now: float, metric: str) -> Violation:
        reason = f"{change} {before:.3g} to {now:.3g} (means of {self.config.window} steps)"
        return Violation(reason, {f"{metric}/before": before, metric: now})


_WATCHED = (
    metrics.SCORE_MEAN,
    metrics.ENTROPY,
    metrics.TEACHER_ENTROPY,
    metrics.RESPONSE_LENGTH_MEAN,
    metrics.RESPONSE_LENGTH_CLIP_RATIO,
    metrics.REPROMPT_FRACTION,
    metrics.ROLLOUT_SUCCESS_FRACTION,
)


def _find_gains(values: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """The teacher's gain over the student and the upper end of its interval, by data source, if both are known."""
    before, after = metrics.teacher_gain_name("\n").split("\n")
    gains = {}
    for name, gain in values.items():
        high = values.get(metrics.ci95_names(name)[1])
        if name.startswith(before) and name.endswith(after) and high is not None:
            gains[name[len(before) : -len(after)]] = (gain, high)
    return gains
