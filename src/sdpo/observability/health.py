"""Is the training well? Rules over the metrics of each step, which say when it is not, why, and what is to be done.

A rule compares the mean of the last ``health.window`` steps with what it was: the best such mean so far, or that of the
first steps. Two things have to hold: the change is large enough to matter (a setting of the rule), and it is more than
chance makes of steps that differ as much as these do (``health.min_z_score``). An alarm is raised when a rule begins to
hold, not again as long as it does, and again only after it has not held for a window.
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
    """A rule that has begun to hold.

    Attributes:
        step: at which.
        rule: its name, which is that of the setting with its action.
        action: what is to be done: ``warn``, ``lower``, ``freeze`` or ``stop``.
        reason: one sentence with the numbers.
        values: those numbers, by metric.
    """

    step: int
    rule: str
    action: str
    reason: str
    values: Mapping[str, float]


class Violation(NamedTuple):
    """Why a rule holds."""

    reason: str
    values: dict[str, float]


class RollingMean:
    """One metric's mean over the last steps beside what it was.

    Attributes:
        first: mean of the first ``window`` steps; None before that.
        lowest, highest: of the means of ``window`` steps so far.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.first: float | None = None
        self.lowest = math.inf
        self.highest = -math.inf
        self._recent: list[float] = []
        self._count = 0
        self._squares = 0.0  # of the differences between neighbours

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
        """Whether the last steps and the first ones are different steps."""
        return self._count >= 2 * self.window

    @property
    def mean(self) -> float:
        """Of the last steps; NaN before the first."""
        return sum(self._recent) / len(self._recent) if self._recent else math.nan

    @property
    def noise(self) -> float:
        """Standard error of the difference between two such means, were there nothing but noise.

        A step's variance is half the mean square of the difference between neighbours, which a trend hardly changes.
        Source: von Neumann, Annals of Mathematical Statistics 12 (1941).
        """
        variance = self._squares / (2 * max(1, self._count - 1))
        return math.sqrt(2 * variance / self.window)

    def state_dict(self) -> dict[str, Any]:
        # Infinities are no JSON.
        ends = {"lowest": self.lowest, "highest": self.highest} if self.first is not None else {}
        return {"first": self.first, "recent": self._recent, "count": self._count, "squares": self._squares, **ends}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.first, self._recent = state["first"], list(state["recent"])
        self._count, self._squares = state["count"], state["squares"]
        self.lowest, self.highest = state.get("lowest", math.inf), state.get("highest", -math.inf)


class HealthMonitor:
    """Reads the metrics of every step, in order, and raises alarms."""

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self.num_events = 0
        self._trends = {name: RollingMean(config.window) for name in _WATCHED}
        self._gains: dict[str, tuple[float, float]] = {}  # data source -> teacher's last gain, its upper end
        self._well_since: dict[str, int] = {}  # rule that has held -> steps since it last did
        self._rules: dict[str, Callable[[], Violation | None]] = {
            "score_collapse": self._score_collapse,
            "entropy_collapse": self._entropy_collapse,
            "entropy_explosion": self._entropy_explosion,
            "length_collapse": self._length_collapse,
            "teacher_entropy_increase": self._teacher_unsure,
            "teacher_underperforms_student": self._teacher_worse,
            "no_distillation_targets": self._nothing_to_distil,
        }

    def check(self, step: int, values: Mapping[str, float]) -> list[HealthEvent]:
        """Take in a step's metrics; give the alarms that they raise.

        What is missing or not finite is left out: a rule without its metric does not hold.
        """
        for name, trend in self._trends.items():
            if math.isfinite(values.get(name, math.nan)):
                trend.add(float(values[name]))
        self._gains |= _find_gains(values)
        alarms = []
        for name, rule in self._rules.items():
            action = getattr(self.config, name)
            finding = rule() if action != "ignore" else None
            if finding is not None and name not in self._well_since:
                alarms.append(HealthEvent(step, name, action, finding.reason, finding.values))
            self._note(name, finding is not None)
        self.num_events += len(alarms)
        return alarms

    def state_dict(self) -> dict[str, Any]:
        """All that it remembers, in JSON's types."""
        return {
            "num_events": self.num_events,
            "gains": {source: list(gain) for source, gain in self._gains.items()},
            "well_since": dict(self._well_since),
            "trends": {name: trend.state_dict() for name, trend in self._trends.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another one, with the same settings, was."""
        self.num_events = state["num_events"]
        self._gains = {source: (gain, high) for source, (gain, high) in state["gains"].items()}
        self._well_since = dict(state["well_since"])
        for name, trend in self._trends.items():
            trend.load_state_dict(state["trends"][name])

    def _note(self, rule: str, holds: bool) -> None:
        """An episode ends once the rule has not held for a window."""
        if holds:
            self._well_since[rule] = 0
        elif rule in self._well_since:
            self._well_since[rule] += 1
            if self._well_since[rule] >= self.config.window:
                del self._well_since[rule]

    def _score_collapse(self) -> Violation | None:
        score = self._trends[metrics.SCORE_MEAN]
        drop = score.highest - score.mean
        if not score.is_ready or drop <= self.config.score_drop * abs(score.highest) or not self._matters(drop, score):
            return None
        return self._found("training score fell from", score.highest, score.mean, metrics.SCORE_MEAN)

    def _entropy_collapse(self) -> Violation | None:
        entropy = self._trends[metrics.ENTROPY]
        if not entropy.is_ready or entropy.first is None or self._score_has_risen():
            return None
        fall = entropy.first - entropy.mean
        if entropy.mean >= self.config.entropy_fall * entropy.first or not self._matters(fall, entropy):
            return None
        return self._found(
            "entropy fell, and the score did not rise, from", entropy.first, entropy.mean, metrics.ENTROPY
        )

    def _entropy_explosion(self) -> Violation | None:
        return self._rise_of(metrics.ENTROPY, self.config.entropy_rise, "entropy rose from")

    def _teacher_unsure(self) -> Violation | None:
        """It is shown the answer: where it becomes unsure nevertheless, its weights have been spoilt."""
        return self._rise_of(
            metrics.TEACHER_ENTROPY, self.config.teacher_entropy_rise, "the teacher's entropy rose from"
        )

    def _rise_of(self, metric: str, times: float, what: str) -> Violation | None:
        trend = self._trends[metric]
        if not trend.is_ready or trend.mean <= times * trend.lowest:
            return None
        if not self._matters(trend.mean - trend.lowest, trend):
            return None
        return self._found(what, trend.lowest, trend.mean, metric)

    def _length_collapse(self) -> Violation | None:
        length, clipped = (
            self._trends[name] for name in (metrics.RESPONSE_LENGTH_MEAN, metrics.RESPONSE_LENGTH_CLIP_RATIO)
        )
        if length.is_ready and length.first is not None and not self._score_has_risen():
            fell = length.mean < self.config.length_fall * length.first
            if fell and self._matters(length.first - length.mean, length):
                what = "response length fell, and the score did not rise, from"
                return self._found(what, length.first, length.mean, metrics.RESPONSE_LENGTH_MEAN)
        rise = clipped.mean - clipped.lowest if clipped.is_ready else 0.0
        if rise > self.config.max_clip_ratio_increase and self._matters(rise, clipped):
            what = "share of responses that are cut off rose from"
            return self._found(what, clipped.lowest, clipped.mean, metrics.RESPONSE_LENGTH_CLIP_RATIO)
        return None

    def _teacher_worse(self) -> Violation | None:
        for source, (gain, high) in self._gains.items():
            if high < -self.config.min_accuracy_gap:
                name = metrics.teacher_gain_name(source)
                reason = (
                    f"held-out accuracy of the teacher on {source} is {-gain:.3g} below the student's, at least "
                    f"{-high:.3g} with 95 % confidence"
                )
                return Violation(reason, {name: gain, metrics.ci95_names(name)[1]: high})
        return None

    def _nothing_to_distil(self) -> Violation | None:
        distilled, succeeded = (
            self._trends[name] for name in (metrics.REPROMPT_FRACTION, metrics.ROLLOUT_SUCCESS_FRACTION)
        )
        if not distilled.is_ready or not succeeded.is_ready or distilled.mean > self.config.min_distilled_fraction:
            return None
        if succeeded.mean >= 1 - self.config.min_distilled_fraction:
            return None  # all is learned, and a teacher that is shown failures only is rightly shown nothing
        reason = (
            f"{distilled.mean:.3g} of the samples were distilled in the last {self.config.window} steps, though only "
            f"{succeeded.mean:.3g} succeeded"
        )
        return Violation(
            reason, {metrics.REPROMPT_FRACTION: distilled.mean, metrics.ROLLOUT_SUCCESS_FRACTION: succeeded.mean}
        )

    def _score_has_risen(self) -> bool:
        """A policy may become sure, or brief, because it knows the answer."""
        score = self._trends[metrics.SCORE_MEAN]
        return score.is_ready and score.first is not None and self._matters(score.mean - score.first, score)

    def _matters(self, difference: float, trend: RollingMean) -> bool:
        return difference > self.config.min_z_score * trend.noise

    def _found(self, what: str, before: float, now: float, metric: str) -> Violation:
        reason = f"{what} {before:.3g} to {now:.3g} (means of {self.config.window} steps)"
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
    """By data source, the teacher's gain over the student and the upper end of its interval, where both are known."""
    before, after = metrics.teacher_gain_name("\n").split("\n")
    gains = {}
    for name, gain in values.items():
        high = values.get(metrics.ci95_names(name)[1])
        if name.startswith(before) and name.endswith(after) and high is not None:
            gains[name[len(before) : -len(after)]] = (gain, high)
    return gains
