"""A run, typed: every setting, its default, its range and its meaning, in one place.

The dataclasses below are at once the schema of a run file, the validation, and the source of
``docs/configuration.md``. Nothing here imports torch, so that the command line starts fast.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdpo.errors import UserError

LARGEST_INTEGER = 2**63 - 1
# verl's names; with + the gradient is another estimate's (``sdpo.algorithm.regularization``).
KL_LOSS_TYPES = tuple(f"{name}{s}" for name in ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3") for s in ("", "+"))
MOST_ROLLOUTS = 1_000_000
MOST_YAML_NODES = 100_000
# A step without gradient multiplies a moment by beta; in bfloat16 a change below 2^-8 may be rounded away.
LARGEST_BETA2_IN_BFLOAT16 = 1 - 2**-8
DEEPEST_YAML = 50


def setting(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    choices: Sequence[str] | None = None,
    is_path: bool = False,
    fixed: bool = False,
) -> Any:
    """A dataclass field with its documentation and its range beside its default.

    ``fixed``: with another value a resumed run would be another run, so that it is refused.
    """
    metadata = {
        "help": help,
        "ge": ge,
        "gt": gt,
        "le": le,
        "choices": tuple(choices) if choices else None,
        "is_path": is_path,
        "fixed": fixed,
    }
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def describe_range(metadata: Mapping[str, Any]) -> str:
    """The range of a setting as text, for error messages and the documentation; empty if there is none."""
    if metadata.get("choices"):
        return "one of " + ", ".join(metadata["choices"])
    ge, gt, le = metadata.get("ge"), metadata.get("gt"), metadata.get("le")
    low = f"[{_format_bound(ge)}" if ge is not None else f"({_format_bound(gt)}" if gt is not None else None
    if low is None and le is None:
        return ""
    return f"in {low or '(-inf'}, {f'{_format_bound(le)}]' if le is not None else 'inf)'}"


def _format_bound(bound: float | None) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _is_too_large(value: Any) -> bool:
    return isinstance(value, int) and abs(value) > LARGEST_INTEGER


def _in_range(value: Any, metadata: Mapping[str, Any]) -> bool:
    if metadata.get("choices"):
        values = value if isinstance(value, (list, tuple)) else [value]
        return all(v in metadata["choices"] for v in values)
    ge, gt, le = metadata.get("ge"), metadata.get("gt"), metadata.get("le")
    if ge is None and gt is None and le is None:
        return not isinstance(value, float) or math.isfinite(value)
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (ge is None or value >= ge)
        and (gt is None or value > gt)
        and (le is None or value <= le)
    )


@dataclass(frozen=True)
class Section:
    """Base of all sections: checks every setting against the range that stands beside it."""

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if _is_too_large(value):
                raise UserError(f"{self._key(f.name)} must be an integer of 64 bits, got {value!r:.40}")
            if value is None or value == MISSING or _in_range(value, f.metadata):
                continue
            raise UserError(f"{self._key(f.name)} must be {describe_range(f.metadata) or 'finite'}, got {value!r}")

    def _key(self, name: str) -> str:
        return f"{self.section}.{name}" if self.section else name


@dataclass(frozen=True)
class ModelConfig(Section):
    section: ClassVar[str] = "model"

    path: str = setting(
        MISSING, "Folder or hub name of the model, in the Hugging Face format.", is_path=True, fixed=True
    )
    dtype: str = setting("float32", "Data type of the student's weights.", choices=["float32", "bfloat16"], fixed=True)
    attn_implementation: str = setting(
        "sdpa", "Attention kernel of transformers.", choices=["sdpa", "eager", "flash_attention_2"]
    )
    trust_remote_code: bool = setting(False, "Run code that comes with the model.")


@dataclass(frozen=True)
class DataConfig(Section):
    section: ClassVar[str] = "data"

    task: str = setting(
        MISSING,
        "What grades a response: the name of a built-in task, or a Python file or module that defines `grade(row, "
        "response)`.",
        is_path=True,
        fixed=True,
    )
    task_args: dict[str, Any] = setting({}, "Arguments of the task, by name.", fixed=True)
    train_files: list[str] = setting([], "Parquet files of training rows, in verl's schema.", is_path=True, fixed=True)
    val_files: list[str] = setting([], "Parquet files of held-out rows, in verl's schema.", is_path=True)
    train_batch_size: int = setting(32, "Prompts a step.", ge=1, fixed=True)
    max_prompt_length: int = setting(2048, "Longest prompt, in tokens.", ge=1)
    filter_overlong_prompts: bool = setting(False, "Skip and count longer prompts; otherwise they are an error.")
    max_pixels: int = setting(
        1_003_520,
        "Largest image, in pixels; larger ones are made smaller. The default is 1280 patches of 28 x 28.",
        ge=1,
    )
    filter_unreadable_images: bool = setting(
        False, "Skip and count rows whose images cannot be read; otherwise they are an error."
    )
    grader_timeout: float | None = setting(
        30.0, "Seconds that grading one response may take; longer is a failure of the grader.", gt=0, le=86_400
    )
    max_grader_failures: float = setting(
        0.1,
        "Largest share of a step's or an evaluation's responses on which the grader may fail (raise, take too long, "
        "return no score); with more, the run stops.",
        ge=0,
        le=1,
    )
    shuffle: bool = setting(True, "Draw the training rows in an order given by the seed, anew each epoch.", fixed=True)


@dataclass(frozen=True)
class SamplerConfig(Section):
    section: ClassVar[str] = "sampler"

    engine: str = setting(
        "transformers",
        "What samples: transformers, or a vLLM engine beside it (which is installed separately).",
        choices=["transformers", "vllm"],
    )
    device: str = setting("auto", "Where rollouts are sampled: auto, cpu, cuda, cuda:0, mps, ...")
    n: int = setting(8, "Rollouts a prompt.", ge=1, fixed=True)
    temperature: float = setting(1.0, "Sampling temperature; student and teacher logits are divided by it too.", gt=0)
    top_p: float = setting(1.0, "Nucleus sampling: keep the likeliest tokens that reach this mass.", gt=0, le=1)
    max_response_length: int = setting(1024, "Longest response, in tokens.", ge=1, le=10_000_000)
    batch_size: int = setting(256, "Sequences decoded side by side.", ge=1)
    kv_cache_gib: float = setting(4.0, "Size of vLLM's key-value cache, in GiB (engine vllm).", gt=0)
    num_threads: int | None = setting(None, "CPU threads of the sampler's own process (staleness 1).", ge=1, le=1024)
    max_restarts: int = setting(
        3, "How often in a run that process is started again if it is killed (staleness 1).", ge=0
    )


@dataclass(frozen=True)
class LearnerConfig(Section):
    section: ClassVar[str] = "learner"

    device: str = setting("auto", "Where student and teacher are trained: auto, cpu, cuda, cuda:1, mps, ...")
    mini_batch_size: int | None = setting(
        None, "Prompts an optimizer step; all prompts of the step if not set.", ge=1, fixed=True
    )
    micro_batch_tokens: int = setting(
        4096,
        "Most tokens in one micro-batch, the teacher's included, and padding where the model cannot read packed rows; "
        "one sample is always let in.",
        ge=1,
    )
    loss_agg_mode: str = setting(
        "token-mean",
        "How token losses become one number.",
        choices=["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"],
    )
    kl_loss_coef: float = setting(
        0.0,
        "Weight of KL(student || initial model) in the loss, over all response tokens; 0: no such term, and no copy of "
        "the initial model for it.",
        ge=0,
    )
    kl_loss_type: str = setting(
        "low_var_kl",
        "Estimate of that KL from the sampled token; with + at its end it has the gradient of mse, which is unbiased.",
        choices=KL_LOSS_TYPES,
    )
    entropy_coeff: float = setting(
        0.0, "Weight of the student's entropy over all response tokens, which is subtracted from the loss.", ge=0
    )
    rollout_is: str = setting(
        "token",
        "Importance weight old policy / sampler, by token, by the product over the sequence, or none.",
        choices=["none", "token", "sequence"],
    )
    rollout_is_threshold: float = setting(2.0, "Those weights are truncated above this.", gt=0)
    autocast: bool = setting(
        False, "Run forward and backward in bfloat16 autocast, and sample in bfloat16; weights keep model.dtype."
    )
    freeze_vision: bool = setting(
        False,
        "Train the language model alone and leave the image tower and its projector as they are.",
        fixed=True,
    )
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass to save memory.")
    num_threads: int | None = setting(
        None, "CPU threads of the learner's process; torch's choice if not set.", ge=1, le=1024
    )


@dataclass(frozen=True)
class LoraConfig(Section):
    """Low-rank adapters; with them all other weights, an image tower's too, stay as they are."""

    section: ClassVar[str] = "lora"

    rank: int = setting(0, "Rank of the adapters; 0: none, all weights are trained.", ge=0, fixed=True)
    alpha: int | None = setting(
        None, "An adapter's product is multiplied by alpha / rank; twice the rank if not set.", ge=1, fixed=True
    )
    target_modules: list[str] = setting(
        [],
        "Linear layers of the language model that get adapters, by the end of their names (q_proj); if empty, all but "
        "the output layer.",
        fixed=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "target_modules"):
            if self.rank == 0 and getattr(self, name):
                raise UserError(f"lora.{name} has no effect with lora.rank=0; set lora.rank or remove it")

    @property
    def scale_numerator(self) -> int:
        """``alpha``, or what it is if not set; an adapter's product is multiplied by it over ``rank``."""
        return self.alpha or 2 * self.rank


@dataclass(frozen=True)
class OptimConfig(Section):
    section: ClassVar[str] = "optim"

    name: str = setting(
        "adamw",
        "adamw: moments in the data type of the weights; adamw_8bit: in 8 bits (torchao), a quarter of float32's.",
        choices=["adamw", "adamw_8bit"],
        fixed=True,
    )
    stochastic_rounding: bool = setting(
        False,
        "Round bfloat16 weights up or down at random after an update (torchao), so that one too small for them counts "
        "on average.",
    )
    lr: float = setting(1e-5, "Peak learning rate of AdamW.", gt=0)
    weight_decay: float = setting(0.01, "Decoupled weight decay.", ge=0)
    beta1: float = setting(0.9, "AdamW's first-moment decay.", ge=0, le=1)
    beta2: float = setting(
        0.999,
        "AdamW's second-moment decay; moments in bfloat16 can decay with 0.996 at most.",
        ge=0,
        le=1,
    )
    warmup_steps: int = setting(10, "Optimizer steps of linear warm-up.", ge=0)
    schedule: str = setting(
        "constant",
        "Learning rate after warm-up, over the whole run.",
        choices=["constant", "linear", "cosine"],
        fixed=True,
    )
    grad_clip: float = setting(1.0, "Largest global gradient norm.", gt=0)


@dataclass(frozen=True)
class SelfDistillationConfig(Section):
    """What the SDPO loss is and what the teacher is and sees. Used by both engines."""

    section: ClassVar[str] = "self_distillation"

    # The divergence
    full_logit_distillation: bool = setting(
        True, "Compare whole next-token distributions; if false, the sampled token alone (needs alpha=1)."
    )
    alpha: float = setting(
        0.0, "0 forward KL(teacher||student), 1 reverse KL(student||teacher), between: Jensen-Shannon.", ge=0, le=1
    )
    distillation_topk: int | None = setting(
        None, "Keep the student's k likeliest tokens instead of the vocabulary.", ge=1
    )
    distillation_add_tail: bool = setting(
        True, "With top-k: one more bucket holds the rest of the mass; if false, both sides are renormalised."
    )
    divergence_clip: float | None = setting(
        None,
        "A token whose divergence (sampled token: whose log-ratio) exceeds this many nats is scaled down to it.",
        gt=0,
    )
    teacher_entropy_beta: float = setting(
        0.0, "Weight tokens by exp(-beta * teacher entropy in nats): an unsure teacher counts less.", ge=0
    )

    # Importance ratio, weights
    is_clip: float | None = setting(
        2.0, "Truncate the ratio student / old policy at this, by token; null leaves the ratio out.", gt=0
    )
    weight_by_prompt_difficulty: bool = setting(
        False, "Weight a sample by sqrt(p(1-p)), p being the share of its prompt's rollouts that succeeded."
    )
    distillation_weight_start: float = setting(1.0, "Weight of the distillation loss at the first step.", ge=0)
    distillation_weight_end: float = setting(1.0, "... and at the last step; linear between.", ge=0)

    # The blend with GRPO
    grpo_coef: float = setting(
        0.0,
        "grpo_coef * GRPO + (1 - grpo_coef) * SDPO; 1 is plain GRPO, without a teacher.",
        ge=0,
        le=1,
        fixed=True,
    )
    clip_ratio_low: float = setting(0.2, "PPO clipping of the ratio below 1, in the GRPO part.", ge=0, le=1)
    clip_ratio_high: float = setting(0.2, "PPO clipping of the ratio above 1, in the GRPO part.", ge=0)
    norm_adv_by_std_in_grpo: bool = setting(True, "Divide group-relative advantages by the group's deviation.")

    # The teacher's weights
    teacher_regularization: str = setting(
        "ema",
        "ema: moving average of the student; trust-region: logits between the initial model and the student; frozen: "
        "the initial model; live: the student itself; snapshot: the student of some steps ago.",
        choices=["ema", "trust-region", "frozen", "live", "snapshot"],
        fixed=True,
    )
    ema_update_rate: float = setting(
        0.05,
        "Share of the student in the teacher: of the weights a step (ema), of the logits (trust-region).",
        ge=0,
        le=1,
    )
    teacher_snapshot_every: int = setting(50, "Steps between snapshots (snapshot).", ge=1)

    # What the teacher is shown
    demonstration_source: str = setting(
        "ground_truth",
        "Whose solution the teacher sees: the row's ground truth, a random successful rollout of the same prompt, such "
        "a peer and else the ground truth, or none.",
        choices=["ground_truth", "peer", "peer_then_ground_truth", "none"],
    )
    success_reward_threshold: float = setting(1.0, "A rollout with at least this score is a success.")
    dont_reprompt_on_self_success: bool = setting(
        True, "A rollout is never its own demonstration (another success of the same prompt may be)."
    )
    distill_only_failed: bool = setting(False, "Distil only the rollouts that did not succeed.")
    include_environment_feedback: bool = setting(True, "Show the grader's feedback on the rollout, if there is any.")
    environment_feedback_only_without_solution: bool = setting(
        True, "Show feedback only where there is no demonstration."
    )
    remove_thinking_from_demonstration: bool = setting(True, "Cut the reasoning out of demonstrations.")
    max_reprompt_len: int = setting(
        10240, "Longest teacher prompt, in tokens; only demonstration and feedback are trimmed to fit.", ge=1
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
                raise UserError(
                    f"self_distillation.alpha must be 1 when full_logit_distillation is false (the sampled token alone "
                    f"gives an estimate of the reverse KL only), got {self.alpha!r}"
                )
            if self.distillation_topk is not None:
                raise UserError("self_distillation.distillation_topk needs full_logit_distillation=true; remove one")
            if self.teacher_entropy_beta:
                raise UserError(
                    "self_distillation.teacher_entropy_beta needs full_logit_distillation=true; set it to 0"
                )
        if self.distills and self.demonstration_source == "none" and not self.include_environment_feedback:
            raise UserError(
                "self_distillation.demonstration_source is none and include_environment_feedback is false: the teacher "
                "would see nothing; set one of them, or grpo_coef=1"
            )
        for name, placeholders in _TEMPLATE_PLACEHOLDERS.items():
            missing = [p for p in placeholders if f"{{{p}}}" not in getattr(self, name)]
            if missing:
                raise UserError(f"self_distillation.{name} lacks the placeholder {{{missing[0]}}}")

    @property
    def distills(self) -> bool:
        """Whether the loss has a distillation part at all, and so a teacher."""
        return self.grpo_coef < 1.0


_TEMPLATE_PLACEHOLDERS = {
    "reprompt_template": ("prompt", "solution", "feedback"),
    "solution_template": ("successful_previous_attempt",),
    "feedback_template": ("feedback_raw",),
}


@dataclass(frozen=True)
class EvalConfig(Section):
    section: ClassVar[str] = "eval"

    before_training: bool = setting(True, "Also evaluate before the first step.")
    max_prompts: int | None = setting(None, "Held-out rows used, from the first; all if not set.", ge=1)
    n: int = setting(
        0,
        "Sampled responses a held-out prompt for mean@n and best@n (pass@n), at least 2; 0: greedy only.",
        ge=0,
        le=10_000,
    )
    temperature: float = setting(1.0, "Temperature of those samples.", gt=0)
    top_p: float = setting(1.0, "Nucleus of those samples.", gt=0, le=1)
    teacher: bool = setting(True, "Also grade the teacher, prompted as it is in training.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n == 1:
            raise UserError("eval.n must be 0 or at least 2, got 1: mean@1 is the name of the greedy accuracy")


ALARM_ACTIONS = ("ignore", "warn", "lower", "freeze", "stop")


@dataclass(frozen=True)
class HealthConfig(Section):
    """Rules over the metrics of each training step, explained in ``docs/health.md``."""

    section: ClassVar[str] = "health"

    score_collapse: str = setting(
        "warn",
        "What to do when the training score falls: ignore it; warn; lower the distillation weight; freeze the teacher; "
        "stop.",
        choices=ALARM_ACTIONS,
    )
    entropy_collapse: str = setting(
        "warn", "... when the entropy falls and the score does not rise.", choices=ALARM_ACTIONS
    )
    entropy_explosion: str = setting("warn", "... when the entropy rises.", choices=ALARM_ACTIONS)
    length_collapse: str = setting(
        "warn",
        "... when responses become short and the score does not rise, or many more are cut off.",
        choices=ALARM_ACTIONS,
    )
    teacher_unsure: str = setting("warn", "... when the teacher's entropy rises.", choices=ALARM_ACTIONS)
    teacher_worse: str = setting(
        "warn", "... when the teacher is worse than the student at an evaluation.", choices=ALARM_ACTIONS
    )
    nothing_to_distil: str = setting(
        "warn", "... when hardly a sample is distilled, though many fail.", choices=ALARM_ACTIONS
    )
    window: int = setting(5, "Steps whose mean is compared; no rule holds before twice as many.", ge=1)
    tolerance: float = setting(
        6.0, "A change counts only if it is more than so many standard errors, as neighbouring steps differ.", ge=0
    )
    score_drop: float = setting(0.1, "Score: falls by more than this share of its best.", ge=0)
    entropy_fall: float = setting(0.1, "Entropy: falls below this share of the first window's.", ge=0, le=1)
    entropy_rise: float = setting(2.0, "Entropy: rises above so many times its lowest.", ge=1)
    length_fall: float = setting(0.5, "Length: falls below this share of the first window's.", ge=0, le=1)
    clip_rise: float = setting(
        0.25, "Length: the share of responses that are cut off rises by more than this above its lowest.", ge=0, le=1
    )
    teacher_entropy_rise: float = setting(2.0, "Teacher: its entropy rises above so many times its lowest.", ge=1)
    teacher_margin: float = setting(
        0.02, "Teacher: its held-out accuracy is below the student's by more than this, with 95 % confidence.", ge=0
    )
    distilled_share: float = setting(
        0.02,
        "Distilled: at most this share of the samples is, though more than this share fails.",
        ge=0,
        le=1,
    )
    lower_factor: float = setting(
        0.5, "The action lower multiplies the weight of the distillation loss by this, each time.", gt=0, le=1
    )
    lower_floor: float = setting(0.1, "... but never makes it less than this share of what is scheduled.", gt=0, le=1)
    kl_to_initial_every: int = setting(
        0,
        "Steps between estimates of the KL divergence from the initial model; 0: never. Costs two forward passes each "
        "time and, unless the teacher is frozen or trust-region, a copy of the initial weights.",
        ge=0,
    )

    @property
    def actions(self) -> dict[str, str]:
        """What each rule does, by the rule's name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["choices"]}

    @property
    def may_freeze(self) -> bool:
        return "freeze" in self.actions.values()

    def lower(self, factor: float) -> float:
        """What the action ``lower`` makes of the factor, in (0, 1], of the scheduled distillation weight."""
        return max(factor * self.lower_factor, self.lower_floor)

    def check_actions(self, self_distillation: SelfDistillationConfig) -> None:
        """Refuse actions that could do nothing.

        Raises:
            UserError: names the rule and what to use instead.
        """
        for rule, action in self.actions.items():
            if action in ("lower", "freeze") and not self_distillation.distills:
                raise UserError(
                    f"health.{rule}={action} has no effect with self_distillation.grpo_coef=1, where nothing is "
                    "distilled; use warn or stop"
                )
            if action == "freeze" and self_distillation.teacher_regularization == "frozen":
                raise UserError(
                    f"health.{rule}=freeze has no effect with self_distillation.teacher_regularization=frozen; use "
                    "warn, lower or stop"
                )


@dataclass(frozen=True)
class TrackingConfig(Section):
    section: ClassVar[str] = "tracking"

    backends: list[str] = setting(
        [], "Where metrics go besides metrics.jsonl.", choices=["tensorboard", "wandb", "trackio"]
    )
    project: str = setting("sdpo", "Project name shown by wandb and trackio.")
    name: str | None = setting(None, "Run name shown by the trackers; the run folder's name if not set.")
    rollouts_every: int = setting(10, "Write sampled rollouts as readable text every so many steps; 0: never.", ge=0)
    rollouts_per_save: int = setting(8, "Rollouts written each time.", ge=1)


@dataclass(frozen=True)
class Run(Section):
    """A whole run: what one YAML file says.

    Keys in ``verl`` stand there as on Hydra's command line, so that a line of verl's documentation can be copied and
    ``+`` and ``++`` mean what they mean there. Sections within it are flattened (``flatten_keys``), which is how
    ``verl.trainer.nnodes=2`` on the command line arrives.
    """

    seed: int = setting(0, "Seed of everything that is random.", ge=0, fixed=True)
    run_dir: str = setting(MISSING, "Folder of the run; everything it writes stands directly under it.", is_path=True)
    total_steps: int = setting(100, "Training steps (rollout batches).", ge=1, le=1_000_000_000)
    eval_every: int = setting(10, "Steps between evaluations; 0: only before the first and after the last step.", ge=0)
    save_every: int = setting(0, "Steps between checkpoints; 0: only after the last step.", ge=0)
    keep_last: int = setting(2, "Newest checkpoints that are kept.", ge=1)
    keep_best: int = setting(
        1, "Besides, so many of those with the highest held-out accuracy; one counts if its step was evaluated.", ge=0
    )
    resume: str = setting(
        "never",
        "What becomes of an earlier run in run_dir. never: it is moved aside; auto: it goes on from its newest whole "
        "checkpoint, if there is one; must: the same, and without one is an error.",
        choices=["never", "auto", "must"],
    )
    stop_within: float = setting(
        20.0, "Seconds that a stopped run (Ctrl-C, SIGTERM) waits for rollouts in flight before it saves.", ge=0
    )
    staleness: int = setting(
        0,
        "0: sample, then learn. 1: batch k+1 is sampled in another process while batch k is learned.",
        ge=0,
        le=1,
        fixed=True,
    )
    verl: dict[str, Any] = setting(
        {},
        "Settings that verl alone has, by their dotted Hydra keys (trainer.nnodes: 2); they win over what the run says "
        "otherwise. The embedded engine does not read them.",
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    self_distillation: SelfDistillationConfig = field(default_factory=SelfDistillationConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.train_batch_size * self.sampler.n > MOST_ROLLOUTS:
            raise UserError(
                f"data.train_batch_size={self.data.train_batch_size} times sampler.n={self.sampler.n} is more than "
                f"{MOST_ROLLOUTS} rollouts a step; lower one of them"
            )
        self.health.check_actions(self.self_distillation)
        mini = self.learner.mini_batch_size
        if mini is not None and self.data.train_batch_size % mini:
            raise UserError(
                f"learner.mini_batch_size={mini} must divide data.train_batch_size={self.data.train_batch_size}"
            )
        self._check_rounding()
        if self.lora.rank and self.learner.freeze_vision:
            raise UserError(
                "learner.freeze_vision has no effect with lora.rank > 0, which never trains the image tower; remove it"
            )

    def _check_rounding(self) -> None:
        """What is trained is rounded to bfloat16 only without adapters, which are float32."""
        half = self.model.dtype == "bfloat16" and self.lora.rank == 0
        if self.optim.stochastic_rounding and not half:
            what = "lora.rank > 0" if self.lora.rank else f"model.dtype={self.model.dtype}"
            raise UserError(
                f"optim.stochastic_rounding has no effect with {what}, where weights that learn are float32; remove it"
            )
        if half and self.optim.beta2 > LARGEST_BETA2_IN_BFLOAT16:
            raise UserError(
                f"optim.beta2={self.optim.beta2} with model.dtype=bfloat16: second moments in bfloat16 would never "
                f"decay; set optim.beta2=0.95 (at most {LARGEST_BETA2_IN_BFLOAT16:.3f}) or model.dtype=float32"
            )

    @property
    def sampling_dtype(self) -> str:
        """Of the weights that sample: what the learner computes in."""
        return "bfloat16" if self.learner.autocast else self.model.dtype

    @property
    def trains_vision(self) -> bool:
        """Whether the image tower, where there is one, learns."""
        return not self.learner.freeze_vision and self.lora.rank == 0

    @property
    def needs_initial(self) -> bool:
        """Whether something is compared with the initial model, or it may become the teacher."""
        teacher = self.self_distillation
        may_become_teacher = self.health.may_freeze and teacher.distills and teacher.teacher_regularization == "live"
        return may_become_teacher or self.health.kl_to_initial_every > 0 or self.learner.kl_loss_coef > 0

    @property
    def teacher_stays_initial(self) -> bool:
        """Whether the teacher's weights are the initial model's throughout."""
        teacher = self.self_distillation
        return teacher.distills and teacher.teacher_regularization in ("frozen", "trust-region")


_SECTIONS = tuple(f.name for f in dataclasses.fields(Run) if f.default_factory is not dataclasses.MISSING)


def iterate_settings(section: type[Section] = Run, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every setting as (dotted key, dataclass field), in the order in which it is written."""
    defaults = section()
    for f in dataclasses.fields(section):
        value = getattr(defaults, f.name)
        if isinstance(value, Section):
            yield from iterate_settings(type(value), f"{f.name}.")
        else:
            yield prefix + f.name, f


def get_setting(run: Run, key: str) -> Any:
    """The value of a setting by its dotted key."""
    value: Any = run
    for name in key.split("."):
        value = getattr(value, name)
    return value


def flatten_keys(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; of a key that is said twice, the last value. An empty mapping is a value."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten_keys(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# Keys of the official implementation's section without effect here, at the one value that means what is done here.
_OFFICIAL_VALUES = {
    "rho": 0.25,
    "renyi_regularization": False,
    "renyi_regularization_level": 0.5,
    "reprompt_truncation": "right",
}


def _translate_official_keys(origin: str, section: dict[str, Any]) -> None:
    """Change the official implementation's ``self_distillation`` section into ours, in place.

    Raises:
        UserError: a Renyi divergence or another truncation is asked for, or one rate is set under both of its names.
    """
    section.pop("_target_", None)
    for key, supported in _OFFICIAL_VALUES.items():
        if key in section and (value := section.pop(key)) != supported:
            raise UserError(
                f"{origin}: self_distillation.{key}={value}: not implemented; remove it, or set it to {supported}"
            )
    if "teacher_update_rate" in section:
        if "ema_update_rate" in section:
            raise UserError(
                f"{origin}: self_distillation.teacher_update_rate and ema_update_rate are the same setting; remove one"
            )
        section["ema_update_rate"] = section.pop("teacher_update_rate")


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Read a run file and apply ``key=value`` overrides.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown (the nearest known one is named), a value has the
            wrong type or is out of range, or a mandatory key is not set. One line each.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such run file; shipped ones are in configs/")
    try:
        _refuse_endless_yaml(path)
        loaded = OmegaConf.load(path)
    except UserError:
        raise
    except Exception as error:  # yaml raises its own family of errors
        raise UserError(f"{path}: not a YAML file: {_one_line(error)}") from error
    if isinstance(loaded, ListConfig) or not isinstance(loaded, DictConfig):
        raise UserError(f"{path}: must be a mapping of settings at the top level")
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise UserError(f"override {override!r} is not of the form key=value")
    try:
        changes = OmegaConf.from_dotlist(list(overrides))
    except Exception as error:
        raise UserError(f"overrides {' '.join(overrides)}: {_one_line(error)}") from error
    return _build_run([(str(path), loaded), *([("command line", changes)] if overrides else [])])


def _refuse_endless_yaml(path: Path) -> None:
    """An alias can stand for itself, or a few of them for more than memory holds."""
    with path.open(encoding="utf-8") as file:
        pending = [(yaml.compose(file), 1)]
    num_nodes = 0
    while pending:
        node, depth = pending.pop()
        num_nodes += 1
        if depth > DEEPEST_YAML or num_nodes > MOST_YAML_NODES:
            raise UserError(
                f"{path}: line {node.start_mark.line + 1}: more than {DEEPEST_YAML} levels or {MOST_YAML_NODES} "
                "values, aliases written out; a run is a few sections with settings in them"
            )
        if isinstance(node, yaml.MappingNode):
            pending += [(child, depth + 1) for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            pending += [(child, depth + 1) for child in node.value]


def _build_run(sources: Sequence[tuple[str, DictConfig]]) -> Run:
    merged = OmegaConf.structured(Run)
    for node in [merged, *(merged[name] for name in _SECTIONS)]:
        OmegaConf.set_readonly(node, None)  # frozen dataclasses become read-only nodes, which cannot be merged into
    for origin, source in sources:
        values: Any = OmegaConf.to_container(source, resolve=False)
        if isinstance(values.get("self_distillation"), dict):
            _translate_official_keys(origin, values["self_distillation"])
            source["self_distillation"] = values["self_distillation"]
        _refuse_unknown_keys(origin, values)
        if isinstance(values.get("verl"), Mapping):
            source["verl"] = flatten_keys(values["verl"])  # or a key written in two ways would be two keys
        try:
            merged = OmegaConf.merge(merged, source)
        except OmegaConfBaseException as error:
            raise UserError(f"{origin}: {_explain(error)}") from error
    origin = " + ".join(name for name, _ in sources)
    try:
        for key, f in iterate_settings():
            value = OmegaConf.select(merged, key)  # unlike resolve, it names the key whose interpolation fails
            _visit(value)
            if str(f.type).startswith("list") and not isinstance(value, ListConfig):
                raise UserError(f"{key} must be a list, in brackets, got {value!r}")
        OmegaConf.resolve(merged)
        _expand_home(merged)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(f"{missing[0]} is not set; add it to the file or as {missing[0]}=...")
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(f"{origin}: {_explain(error)}") from error
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


def _visit(value: Any) -> None:
    """Every value within, for the error that it may be."""
    for inner in value.values() if isinstance(value, DictConfig) else value if isinstance(value, ListConfig) else ():
        _visit(inner)


def _expand_home(merged: DictConfig) -> None:
    for key, f in iterate_settings():
        value = OmegaConf.select(merged, key) if f.metadata["is_path"] else None
        if isinstance(value, str):
            OmegaConf.update(merged, key, os.path.expanduser(value))
        elif value is not None:
            OmegaConf.update(merged, key, [os.path.expanduser(each) for each in value])


def save_run(run: Run, path: str | Path) -> None:
    """Write the resolved run as YAML; ``load_run`` of it gives an equal run."""
    Path(path).write_text(format_run(run), encoding="utf-8")


def format_run(run: Run) -> str:
    """The resolved run as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(run))


def _refuse_unknown_keys(origin: str, values: Any, schema: Any = None, prefix: str = "") -> None:
    schema = Run() if schema is None else schema
    known = {f.name: getattr(schema, f.name) for f in dataclasses.fields(schema)}
    if not isinstance(values, Mapping):
        raise UserError(f"{origin}: {prefix.rstrip('.')} must be a section with settings in it, got {values!r}")
    for key, value in values.items():
        if key not in known:
            every = [k for k, _ in iterate_settings()] + [f.name for f in dataclasses.fields(Run)]
            near = difflib.get_close_matches(f"{prefix}{key}", every, n=1, cutoff=0.5)
            same = [k for k in every if k.split(".")[-1] == str(key)]  # without its section, or in another's
            near = same if same and not prefix else near or same[:1]
            hint = f"; did you mean {' or '.join(near)}?" if near else "; docs/configuration.md lists all keys"
            raise UserError(f"{origin}: unknown key {prefix}{key}{hint}")
        if not isinstance(known[key], Section) and not _can_be_written(value):
            raise UserError(f"{origin}: {prefix}{key} has characters that no file can be named by, got {value!r}")
        if _is_too_large(value):  # of which a float cannot even be made
            raise UserError(f"{origin}: {prefix}{key} must be an integer of 64 bits, got {value!r:.40}")
        if isinstance(known[key], Section):
            _refuse_unknown_keys(origin, value, known[key], f"{key}.")
        elif isinstance(known[key], list) and not isinstance(value, list) and "${" not in str(value):
            raise UserError(f"{origin}: {prefix}{key} must be a list, in brackets, got {value!r}")
        elif isinstance(known[key], list) and any(isinstance(each, (list, Mapping)) for each in value):
            raise UserError(f"{origin}: {prefix}{key} must be a list of names, got {value!r}")
        elif isinstance(known[key], dict) and not isinstance(value, Mapping):
            raise UserError(f"{origin}: {prefix}{key} must be a mapping of names to values, got {value!r}")


def _can_be_written(value: Any) -> bool:
    """Whether all texts in a value are free of NUL and of halves of surrogate pairs."""
    if isinstance(value, Mapping):
        return all(_can_be_written(each) for each in [*value, *value.values()])
    if isinstance(value, list):
        return all(map(_can_be_written, value))
    return not isinstance(value, str) or not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value)


def _explain(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None) or ""
    message = _one_line(str(error).splitlines()[0])
    return f"{key}: {message}" if key and not message.startswith(key) else message


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
