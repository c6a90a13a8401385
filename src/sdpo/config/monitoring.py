"""Settings of validation, health checks and experiment tracking."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from sdpo.config.field import Section, setting
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.errors import ConfigError


@dataclass(frozen=True)
class EvalConfig(Section):
    section: ClassVar[str] = "eval"

    val_before_train: bool = setting(True, "Also evaluate before the first step.")
    max_prompts: int | None = setting(None, "Number of validation rows used, from the first; null: all of them.", ge=1)
    n: int = setting(
        0,
        "Sampled responses per validation prompt for mean@n and best@n (pass@n), at least 2; 0: greedy decoding only.",
        ge=0,
        le=10_000,
    )
    temperature: float = setting(1.0, "Temperature of the n sampled responses.", ge=1e-3)
    top_p: float = setting(1.0, "Nucleus of the n sampled responses.", gt=0, le=1)
    evaluate_teacher: bool = setting(True, "Also evaluate the teacher, with the context it has in training.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n == 1:
            raise ConfigError("eval.n=1: must be 0 or at least 2, because mean@1 is the greedy accuracy")


HEALTH_ACTIONS = ("ignore", "warn", "reduce_weight", "freeze_teacher", "stop")


def _check(default: str, when: str) -> str:
    """Declare the action of a health check."""
    action: str = setting(
        default,
        f"Action when {when}: ignore, warn, reduce_weight (of the distillation loss), freeze_teacher, or stop.",
        choices=HEALTH_ACTIONS,
    )
    return action


@dataclass(frozen=True)
class HealthConfig(Section):
    """Health checks on the metrics of each training step, explained in ``docs/health.md``."""

    section: ClassVar[str] = "health"

    score_collapse: str = _check("warn", "the training score falls")
    entropy_collapse: str = _check("warn", "the entropy falls and the score does not rise")
    entropy_explosion: str = _check("warn", "the entropy rises")
    length_collapse: str = _check(
        "warn", "responses become short and the score does not rise, or many more of them are truncated"
    )
    teacher_entropy_increase: str = _check("warn", "the teacher's entropy rises")
    teacher_underperforms_student: str = _check("warn", "the teacher scores below the student in a validation")
    no_distillation_targets: str = _check("warn", "hardly any sample is distilled although many fail")
    window: int = setting(
        5, "Number of steps in the means that are compared; no check can fail in the first two windows.", ge=1
    )
    min_z_score: float = setting(
        6.0,
        "Ignore changes smaller than this many standard errors, estimated from step-to-step differences.",
        ge=0,
    )
    score_drop: float = setting(
        0.1, "Score collapse: the mean score falls by more than this fraction of its best.", ge=0
    )
    entropy_fall: float = setting(
        0.1, "Entropy collapse: the entropy falls below this fraction of the first window's.", ge=0, le=1
    )
    entropy_rise: float = setting(
        2.0, "Entropy explosion: the entropy rises above this multiple of its lowest value.", ge=1
    )
    length_fall: float = setting(
        0.5, "Length collapse: the response length falls below this fraction of the first window's.", ge=0, le=1
    )
    max_clip_ratio_increase: float = setting(
        0.25,
        "Length collapse: the fraction of truncated responses rises by more than this above its lowest value.",
        ge=0,
        le=1,
    )
    teacher_entropy_rise: float = setting(
        2.0, "Teacher entropy increase: the teacher's entropy rises above this multiple of its lowest value.", ge=1
    )
    min_accuracy_gap: float = setting(
        0.02,
        "Teacher underperforms student: its validation accuracy is lower by more than this, with 95 % confidence.",
        ge=0,
    )
    min_distilled_fraction: float = setting(
        0.02,
        "No distillation targets: at most this fraction of the samples is distilled, while a larger fraction fails.",
        ge=0,
        le=1,
    )
    reduce_factor: float = setting(
        0.5, "Factor by which the action reduce_weight multiplies the coefficient of the distillation loss.", gt=0, le=1
    )
    min_scale: float = setting(
        0.1, "Lowest fraction of the scheduled coefficient to which reduce_weight reduces it.", gt=0, le=1
    )
    ref_kl_interval: int = setting(
        0,
        "Steps between estimates of KL(student || initial model); 0: no estimates. Each costs two forward passes, and "
        "needs a copy of the initial weights unless the teacher is frozen or trust-region.",
        ge=0,
    )

    @property
    def actions(self) -> dict[str, str]:
        """The action of each check, by the check's name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["choices"]}

    @property
    def may_freeze(self) -> bool:
        """Whether a check can freeze the teacher."""
        return "freeze_teacher" in self.actions.values()

    def reduce(self, scale: float) -> float:
        """The next scale of the distillation coefficient, in (0, 1], after the action ``reduce_weight``."""
        return max(scale * self.reduce_factor, self.min_scale)

    def check_actions(self, self_distillation: SelfDistillationConfig) -> None:
        """Refuse actions without effect.

        Raises:
            ConfigError: names the check and an action to use instead.
        """
        for check, action in self.actions.items():
            if action in ("reduce_weight", "freeze_teacher") and not self_distillation.distills:
                raise ConfigError(
                    f"health.{check}={action}: has no effect with self_distillation.policy_loss_weight=1, where "
                    "nothing is distilled; use warn or stop"
                )
            if action == "freeze_teacher" and self_distillation.teacher_regularization == "frozen":
                raise ConfigError(
                    f"health.{check}=freeze_teacher: has no effect with "
                    "self_distillation.teacher_regularization=frozen; use warn, reduce_weight or stop"
                )


@dataclass(frozen=True)
class TrackingConfig(Section):
    section: ClassVar[str] = "tracking"

    report_to: list[str] = setting(
        [],
        "Experiment trackers that get the metrics besides metrics.jsonl.",
        choices=["tensorboard", "wandb", "trackio"],
    )
    project: str = setting("sdpo", "Project name in wandb and trackio.")
    name: str | None = setting(None, "Run name in the trackers; null: the name of the output folder.")
    log_completions_steps: int = setting(10, "Steps between rollouts written as readable text; 0: none.", ge=0)
    num_completions: int = setting(8, "Rollouts written as readable text each time.", ge=1)
