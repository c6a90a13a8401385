"""Settings of the SDPO loss, the teacher's weights and the teacher's prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sdpo.config.field import Section, setting
from sdpo.errors import ConfigError

_TEMPLATE_PLACEHOLDERS = {
    "reprompt_template": ("prompt", "solution", "feedback"),
    "solution_template": ("successful_previous_attempt",),
    "feedback_template": ("feedback_raw",),
}


@dataclass(frozen=True)
class SelfDistillationConfig(Section):
    """The SDPO loss, the teacher and its context, for the native trainer and for verl."""

    section: ClassVar[str] = "self_distillation"

    # The divergence
    full_logit_distillation: bool = setting(
        True, "Compare complete next-token distributions; if false, only the sampled token (requires alpha=1)."
    )
    alpha: float = setting(
        0.0,
        "Divergence: 0 is the forward KL(teacher || student), 1 the reverse KL(student || teacher), values between are "
        "Jensen-Shannon divergences.",
        ge=0,
        le=1,
    )
    distillation_topk: int | None = setting(
        None, "Number of the student's most likely tokens that are compared; null: the complete vocabulary.", ge=1
    )
    distillation_add_tail: bool = setting(
        True,
        "With distillation_topk, add a bucket for the remaining probability; if false, both sides are renormalized.",
    )
    divergence_clip: float | None = setting(
        None,
        "Maximum divergence of a token, in nats (sampled token: of its log-ratio); a larger one is scaled down to it. "
        "null: no limit.",
        gt=0,
    )
    teacher_entropy_beta: float = setting(
        0.0,
        "Weight tokens by exp(-beta * teacher entropy in nats), so that tokens of an uncertain teacher count less.",
        ge=0,
    )

    # Importance ratio, weights
    is_clip: float | None = setting(
        2.0, "Upper limit of the ratio student / old policy of a token; null leaves the ratio out of the loss.", gt=0
    )
    weight_by_prompt_difficulty: bool = setting(
        False, "Weight a sample by sqrt(p(1-p)), where p is the fraction of its prompt's rollouts that succeeded."
    )
    distillation_coef_start: float = setting(
        1.0, "Coefficient of the distillation loss at the first step; linear from there to distillation_coef_end.", ge=0
    )
    distillation_coef_end: float = setting(1.0, "Coefficient of the distillation loss at the last step.", ge=0)

    # The blend with GRPO
    policy_loss_weight: float = setting(
        0.0,
        "Weight w of the GRPO loss in w * GRPO + (1 - w) * SDPO; 1 is plain GRPO without a teacher.",
        ge=0,
        le=1,
        fixed=True,
    )
    clip_ratio_low: float = setting(0.2, "PPO clipping of the ratio below 1, in the GRPO loss.", ge=0, le=1)
    clip_ratio_high: float = setting(0.2, "PPO clipping of the ratio above 1, in the GRPO loss.", ge=0)
    norm_adv_by_std_in_grpo: bool = setting(
        True, "Divide group-relative advantages by the standard deviation of the group's scores."
    )

    # The teacher's weights
    teacher_regularization: str = setting(
        "ema",
        "Teacher weights. ema: moving average of the student; trust-region: mixed logits of initial model and "
        "student; frozen: the initial model; live: the student itself; snapshot: a copy of the student, replaced every "
        "teacher_sync_steps.",
        choices=["ema", "trust-region", "frozen", "live", "snapshot"],
        fixed=True,
    )
    ema_update_rate: float = setting(
        0.05,
        "Fraction of the student in the teacher: of the weights per step (ema), or of the logits (trust-region).",
        ge=0,
        le=1,
    )
    teacher_sync_steps: int = setting(
        50, "Steps between copies of the student into the teacher (teacher_regularization snapshot).", ge=1
    )

    # The teacher's context
    demonstration_source: str = setting(
        "ground_truth",
        "Solution that the teacher is shown: the row's ground truth; a random successful rollout of the same prompt; a "
        "successful rollout if there is one and else the ground truth; or none.",
        choices=["ground_truth", "successful_rollout", "successful_rollout_then_ground_truth", "none"],
    )
    success_reward_threshold: float = setting(1.0, "Minimum score of a successful rollout.")
    dont_reprompt_on_self_success: bool = setting(
        True, "Never show a rollout to itself as a demonstration; another successful rollout may be shown."
    )
    distill_only_failed: bool = setting(False, "Distill only the rollouts that did not succeed.")
    include_environment_feedback: bool = setting(
        True, "Show the reward function's feedback on the rollout, if there is any."
    )
    environment_feedback_only_without_solution: bool = setting(
        True, "Show feedback only to samples without a demonstration."
    )
    remove_thinking_from_demonstration: bool = setting(True, "Remove reasoning from demonstrations.")
    max_reprompt_len: int = setting(
        10240,
        "Maximum length of the teacher's prompt, in tokens; only demonstration and feedback are truncated to fit.",
        ge=1,
    )
    reprompt_template: str = setting(
        "{prompt}{solution}{feedback}\n\nCorrectly solve the original question.\n",
        "The teacher's user message. Placeholders: prompt, solution, feedback.",
    )
    solution_template: str = setting(
        "\nCorrect solution:\n\n{successful_previous_attempt}\n\n",
        "The part with the demonstration. Placeholder: successful_previous_attempt.",
    )
    feedback_template: str = setting(
        "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback_raw}\n\n",
        "The part with the feedback. Placeholder: feedback_raw.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.full_logit_distillation:
            if self.alpha != 1.0:
                raise ConfigError(
                    f"self_distillation.alpha={self.alpha}: must be 1 with full_logit_distillation=false, because the "
                    "sampled token alone gives an estimate of the reverse KL only"
                )
            if self.distillation_topk is not None:
                raise ConfigError(
                    f"self_distillation.distillation_topk={self.distillation_topk}: needs "
                    "full_logit_distillation=true; remove one of them"
                )
            if self.teacher_entropy_beta:
                raise ConfigError(
                    f"self_distillation.teacher_entropy_beta={self.teacher_entropy_beta}: needs "
                    "full_logit_distillation=true; set it to 0"
                )
        if self.distills and self.demonstration_source == "none" and not self.include_environment_feedback:
            raise ConfigError(
                "self_distillation.demonstration_source=none with include_environment_feedback=false: the teacher "
                "has no context; change one of them, or set policy_loss_weight=1"
            )
        for name, placeholders in _TEMPLATE_PLACEHOLDERS.items():
            missing = [p for p in placeholders if f"{{{p}}}" not in getattr(self, name)]
            if missing:
                raise ConfigError(f"self_distillation.{name}: lacks the placeholder {{{missing[0]}}}; add it")

    @property
    def distills(self) -> bool:
        """Whether the loss has a distillation part, which needs a teacher."""
        return self.policy_loss_weight < 1.0
