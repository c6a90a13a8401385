"""The name and meaning of every metric; the source of ``docs/metrics.md``.

Names are verl's where verl has the quantity, and begin with ``self_distillation/`` where it does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")

STEP = "training/global_step"
EPOCH = "training/epoch"
STALENESS = "training/off_policy/trajectory_staleness/mean"

SCORE_MEAN = "critic/score/mean"
SCORE_MAX = "critic/score/max"
SCORE_MIN = "critic/score/min"
ADVANTAGES_MEAN = "critic/advantages/mean"
REWARD_FAILURES = "reward/num_failures"

LOSS = "actor/loss"
PG_LOSS = "actor/pg_loss"
PG_CLIPFRAC = "actor/pg_clipfrac"
PPO_KL = "actor/ppo_kl"
KL_LOSS = "actor/kl_loss"
KL_COEF = "actor/kl_coef"
REF_KL = "actor/ref_kl"
ENTROPY = "actor/entropy"
GRAD_NORM = "actor/grad_norm"
LR = "actor/lr"
SKIPPED_UPDATES = "actor/skipped_updates"
UPDATE_ROUNDING = "actor/update_rounding"

RESPONSE_LENGTH_MEAN = "response_length/mean"
RESPONSE_LENGTH_MAX = "response_length/max"
RESPONSE_LENGTH_CLIP_RATIO = "response_length/clip_ratio"
REPEATED_4GRAMS = "response/repeated_4gram_fraction"
PROMPT_LENGTH_MEAN = "prompt_length/mean"
PROMPT_LENGTH_MAX = "prompt_length/max"

ROLLOUT_IS_MEAN = "rollout_corr/rollout_is_mean"
ROLLOUT_IS_CLIP_FRACTION = "rollout_corr/rollout_is_clip_fraction"
ROLLOUT_KL = "rollout_corr/kl"

DISTILLATION_LOSS = "self_distillation/loss"
DIVERGENCE = "self_distillation/divergence"
DISTILLATION_COEF = "self_distillation/loss_coef"
REPROMPT_FRACTION = "self_distillation/reprompt_sample_fraction"
ROLLOUT_SUCCESS_FRACTION = "self_distillation/rollout_success_fraction"
SUCCESS_GROUP_FRACTION = "self_distillation/success_group_fraction"
SUCCESS_SAMPLE_FRACTION = "self_distillation/success_sample_fraction"
SOLUTION_FRACTION = "self_distillation/solution_used_fraction"
FEEDBACK_AVAILABLE_FRACTION = "self_distillation/feedback_available_fraction"
FEEDBACK_FRACTION = "self_distillation/feedback_used_fraction"
TRUNCATED_FRACTION = "self_distillation/reprompt_truncated_fraction"
OVERLONG_FRACTION = "self_distillation/reprompt_overlong_fraction"
LOGPROB_DIFF_MEAN = "self_distillation/teacher_student_logprob_diff/mean"
LOGPROB_DIFF_POSITIVE_FRACTION = "self_distillation/teacher_student_logprob_diff/positive_frac"
LOGPROB_DIFF_POSITIVE_PART = "self_distillation/teacher_student_logprob_diff/positive_part"
LOGPROB_DIFF_NEGATIVE_PART = "self_distillation/teacher_student_logprob_diff/negative_part"
TEACHER_ENTROPY = "self_distillation/teacher_entropy"
IS_RATIO_MEAN = "self_distillation/is_ratio_mean"
IS_CLIP_FRACTION = "self_distillation/is_clip_fraction"
NONFINITE_SAMPLES = "self_distillation/nonfinite_samples"

VAL_REWARD_FAILURES = "val-aux/reward/num_failures"
NUM_WARNINGS = "health/num_warnings"
TEACHER_FROZEN = "health/teacher_frozen"

TIME_SAMPLE = "timing_s/gen"
TIME_WAIT = "timing_s/wait_for_enough_samples"
TIME_LEARN = "timing_s/update_actor"
TIME_WEIGHTS = "timing_s/update_weights"
TIME_EVAL = "timing_s/testing"
TIME_SAVE = "timing_s/save_checkpoint"
TIME_STEP = "timing_s/step"
TOKENS = "perf/total_num_tokens"
THROUGHPUT = "perf/throughput"

# Metrics by the names of the loss's sums (``sdpo.algorithm.sums``).
LOSS_METRICS = {
    "loss": LOSS,
    "policy_loss": PG_LOSS,
    "policy_clip_fraction": PG_CLIPFRAC,
    "ppo_kl": PPO_KL,
    "advantage": ADVANTAGES_MEAN,
    "kl_loss": KL_LOSS,
    "entropy": ENTROPY,
    "teacher_entropy": TEACHER_ENTROPY,
    "distillation_loss": DISTILLATION_LOSS,
    "divergence": DIVERGENCE,
    "teacher_gap": LOGPROB_DIFF_MEAN,
    "gap_positive_fraction": LOGPROB_DIFF_POSITIVE_FRACTION,
    "gap_positive_part": LOGPROB_DIFF_POSITIVE_PART,
    "gap_negative_part": LOGPROB_DIFF_NEGATIVE_PART,
    "is_clip_fraction": IS_CLIP_FRACTION,
    "is_ratio": IS_RATIO_MEAN,
}

DESCRIPTIONS: dict[str, str] = {  # in the order of docs/metrics.md: each family of names in one block
    STEP: "Number of the training step, from 1; 0 is the validation before training.",
    EPOCH: "Passes over the training rows so far; may be fractional.",
    STALENESS: "Weight updates between sampling and training.",
    SCORE_MEAN: "Mean score of the step's rollouts.",
    SCORE_MAX: "Highest score of the step's rollouts.",
    SCORE_MIN: "Lowest score of the step's rollouts.",
    ADVANTAGES_MEAN: "Mean group-relative advantage over response tokens (only if policy_loss_weight > 0).",
    REWARD_FAILURES: "Rollouts without a score because the reward function failed; neither trained on nor averaged.",
    LOSS: "The differentiated loss, summed over the micro-batches of a mini-batch, mean over mini-batches.",
    PG_LOSS: "GRPO loss, before policy_loss_weight (only if policy_loss_weight > 0).",
    PG_CLIPFRAC: "Fraction of response tokens without gradient because of PPO's clip (only if policy_loss_weight > 0).",
    PPO_KL: "Estimate of KL(old policy || student): mean of log old policy - log student over response tokens.",
    KL_LOSS: "Estimate of KL(student || reference model) by kl_loss_type, aggregated like the loss, before "
    "kl_loss_coef (only if kl_loss_coef > 0).",
    KL_COEF: "Coefficient of actor/kl_loss, kl_loss_coef (only if kl_loss_coef > 0).",
    REF_KL: "Estimate of KL(student || reference model): mean of log student - log reference over response tokens, "
    "before the step's update (only if health.ref_kl_interval > 0).",
    ENTROPY: "Entropy of the student's next-token distribution in nats, mean over response tokens.",
    GRAD_NORM: "Global gradient norm before clipping, mean over mini-batches.",
    LR: "Learning rate of the step's last optimizer step.",
    SKIPPED_UPDATES: "Optimizer steps skipped because of a non-finite gradient.",
    UPDATE_ROUNDING: "Fraction of the optimizer's update lost to the rounding of bfloat16 weights, estimated on a "
    "sample of the weights (only if bfloat16 weights are trained).",
    RESPONSE_LENGTH_MEAN: "Mean response length in tokens, including end-of-sequence.",
    RESPONSE_LENGTH_MAX: "Length of the longest response in tokens.",
    RESPONSE_LENGTH_CLIP_RATIO: "Fraction of responses truncated at rollout.max_response_length.",
    REPEATED_4GRAMS: "Fraction of a response's token 4-grams that occur earlier in it, mean over responses of at "
    "least 4 tokens.",
    PROMPT_LENGTH_MEAN: "Mean prompt length in tokens.",
    PROMPT_LENGTH_MAX: "Length of the longest prompt in tokens.",
    ROLLOUT_IS_MEAN: "Mean truncated importance weight old policy / sampling policy over response tokens.",
    ROLLOUT_IS_CLIP_FRACTION: "Fraction of these importance weights that were truncated.",
    ROLLOUT_KL: "Estimate of KL(sampling policy || old policy): mean of log sampling policy - log old policy over "
    "response tokens.",
    DISTILLATION_LOSS: "Distillation loss, before coefficient and blend (only if policy_loss_weight < 1).",
    DIVERGENCE: "Divergence of student and teacher in nats, mean over distilled tokens, before ratios and weights.",
    DISTILLATION_COEF: "Coefficient of the distillation loss: the scheduled one times the reductions by health checks.",
    REPROMPT_FRACTION: "Fraction of samples that are distilled: the teacher is shown a demonstration or feedback.",
    ROLLOUT_SUCCESS_FRACTION: "Fraction of scored samples with a score of at least success_reward_threshold.",
    SUCCESS_GROUP_FRACTION: "Fraction of prompts with at least one successful rollout.",
    SUCCESS_SAMPLE_FRACTION: "Fraction of samples with a successful rollout as demonstration "
    "(demonstration_source=successful_rollout or successful_rollout_then_ground_truth).",
    SOLUTION_FRACTION: "Fraction of samples with a demonstration from any source.",
    FEEDBACK_AVAILABLE_FRACTION: "Fraction of samples for which the reward function returned feedback.",
    FEEDBACK_FRACTION: "Fraction of samples whose teacher is shown feedback.",
    TRUNCATED_FRACTION: "Fraction of samples whose demonstration or feedback was truncated to max_reprompt_len.",
    OVERLONG_FRACTION: "Fraction of samples dropped because even an empty demonstration exceeds max_reprompt_len.",
    LOGPROB_DIFF_MEAN: "Teacher minus student log-probability of the sampled token, mean over distilled tokens.",
    LOGPROB_DIFF_POSITIVE_FRACTION: "Fraction of distilled tokens whose probability is higher under the teacher.",
    LOGPROB_DIFF_POSITIVE_PART: "Mean of max(difference, 0) over distilled tokens.",
    LOGPROB_DIFF_NEGATIVE_PART: "Mean of min(difference, 0) over distilled tokens; both parts add up to the mean.",
    TEACHER_ENTROPY: "Entropy of the teacher's next-token distribution in nats, mean over distilled tokens.",
    IS_RATIO_MEAN: "Mean truncated ratio student / old policy over distilled tokens.",
    IS_CLIP_FRACTION: "Fraction of distilled tokens whose ratio was truncated at is_clip.",
    NONFINITE_SAMPLES: "Samples dropped because of non-finite values.",
    VAL_REWARD_FAILURES: "Validation responses without a score because the reward function failed; not averaged.",
    NUM_WARNINGS: "Health checks that began to fail at this step.",
    TEACHER_FROZEN: "1 once a health check has frozen the teacher, else 0.",
    TIME_SAMPLE: "Seconds of sampling the step's rollouts.",
    TIME_WAIT: "Seconds that the actor waited for the step's rollouts.",
    TIME_LEARN: "Seconds of forward and backward passes, optimizer and teacher update.",
    TIME_WEIGHTS: "Seconds of the weight sync.",
    TIME_EVAL: "Seconds of validation.",
    TIME_SAVE: "Seconds of writing a checkpoint.",
    TIME_STEP: "Seconds of the training step, all parts included.",
    TOKENS: "Prompt and response tokens of the step's rollouts.",
    THROUGHPUT: "Prompt and response tokens per second and device.",
}

# Names in the files of earlier versions; ``replace_old_names`` applies them.
RENAMED_METRICS = {
    "critic/grader_failures": REWARD_FAILURES,
    "val-aux/grader_failures": VAL_REWARD_FAILURES,
    "self_distillation/weight": DISTILLATION_COEF,
    "self_distillation/distilled_sample_fraction": REPROMPT_FRACTION,
    "self_distillation/demonstration_used_fraction": SOLUTION_FRACTION,
    "self_distillation/teacher_student_log_prob_gap": LOGPROB_DIFF_MEAN,
    "self_distillation/teacher_student_log_prob_gap_positive_fraction": LOGPROB_DIFF_POSITIVE_FRACTION,
    "self_distillation/teacher_student_log_prob_gap_positive_part": LOGPROB_DIFF_POSITIVE_PART,
    "self_distillation/teacher_student_log_prob_gap_negative_part": LOGPROB_DIFF_NEGATIVE_PART,
    "self_distillation/staleness": STALENESS,
    "health/kl_to_initial": REF_KL,
    "health/alarms": NUM_WARNINGS,
    "timing_s/wait_for_rollouts": TIME_WAIT,
}
# Rows with the first name had ROLLOUT_SUCCESS_FRACTION under the name of SUCCESS_SAMPLE_FRACTION.
_OLD_SUCCESS = ("self_distillation/distilled_sample_fraction", SUCCESS_SAMPLE_FRACTION)

# Metrics with a confidence interval; all validation accuracies have one too.
ESTIMATES = (
    SCORE_MEAN,
    ENTROPY,
    RESPONSE_LENGTH_MEAN,
    RESPONSE_LENGTH_CLIP_RATIO,
    REPEATED_4GRAMS,
    REPROMPT_FRACTION,
    ROLLOUT_SUCCESS_FRACTION,
    SUCCESS_GROUP_FRACTION,
    LOGPROB_DIFF_MEAN,
    REF_KL,
)


def ci95_names(metric: str) -> tuple[str, str]:
    """Names of the lower and upper end of a metric's 95 % interval."""
    return f"{metric}/ci95_low", f"{metric}/ci95_high"


def replace_old_names(row: Mapping[str, float]) -> dict[str, float]:
    """A row of ``metrics.jsonl`` under the current names; a name that is current already stays."""
    renamed = RENAMED_METRICS
    if _OLD_SUCCESS[0] in row:
        renamed = {**renamed, _OLD_SUCCESS[1]: ROLLOUT_SUCCESS_FRACTION}
    return {_replace_old_name(name, renamed): value for name, value in row.items()}


def _replace_old_name(name: str, renamed: Mapping[str, str]) -> str:
    metric, interval, end = name.partition("/ci95_")
    if match := _OLD_TEACHER_GAIN.fullmatch(metric):
        return teacher_gain_name(match[1]) + interval + end
    return renamed.get(metric, metric) + interval + end


_OLD_TEACHER_GAIN = re.compile("val-teacher/(.+)/gain/mean@1")


def find_score(values: Mapping[str, float]) -> float | None:
    """The validation accuracy that ranks checkpoints: mean over data sources of their headline accuracies.

    None if no accuracy is among ``values``.
    """
    found = [float(values[val_name(source, statistic)]) for source, statistic in find_accuracies(values).items()]
    return sum(found) / len(found) if found else None


def find_accuracies(names: Iterable[str]) -> dict[str, str]:
    """The statistic of each data source's headline accuracy: ``mean@1``, or ``mean@n`` with the smallest n."""
    fewest: dict[str, int] = {}
    for name in names:
        if match := _ACCURACY.fullmatch(name):
            source, num_samples = match[1], int(match[2])
            fewest[source] = min(num_samples, fewest.get(source, num_samples))
    return {source: f"mean@{num_samples}" for source, num_samples in sorted(fewest.items())}


def val_name(data_source: str, statistic: str) -> str:
    """Name of a validation accuracy of the student, e.g. ``val-core/hidden_rule/acc/mean@1`` (greedy)."""
    return f"val-core/{data_source}/acc/{statistic}"


_ACCURACY = re.compile(re.escape(val_name("SOURCE", "mean@")).replace("SOURCE", "(.+)") + r"(\d+)")


def teacher_prompted_name(data_source: str) -> str:
    """Name of the fraction of validation prompts with teacher context, over which the teacher's accuracy is a mean."""
    return f"val-teacher/{data_source}/prompted_fraction"


def teacher_val_name(data_source: str, statistic: str) -> str:
    """Name of a validation accuracy of the teacher, with the context that it has in training."""
    return f"val-teacher/{data_source}/acc/{statistic}"


def teacher_gain_name(data_source: str) -> str:
    """Name of the teacher's minus the student's score on prompts with teacher context, one greedy response each."""
    return f"val-teacher/{data_source}/acc_minus_student/mean@1"


def name_loss_sums(sums: Mapping[str, T]) -> dict[str, T]:
    """The loss's sums by the names of their metrics."""
    return {LOSS_METRICS[name]: value for name, value in sums.items()}
