"""The name and meaning of every metric, in one place; ``docs/metrics.md`` is made from it.

Names after verl where verl has the quantity, ``self_distillation/`` where it does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

STEP = "training/global_step"
EPOCH = "training/epoch"

SCORE_MEAN = "critic/score/mean"
SCORE_MAX = "critic/score/max"
SCORE_MIN = "critic/score/min"
REWARD_FAILURES = "reward/num_failures"
ADVANTAGES_MEAN = "critic/advantages/mean"

LOSS = "actor/loss"
PG_LOSS = "actor/pg_loss"
PG_CLIPFRAC = "actor/pg_clipfrac"
PPO_KL = "actor/ppo_kl"
KL_LOSS = "actor/kl_loss"
KL_COEF = "actor/kl_coef"
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
TEACHER_GAP = "self_distillation/teacher_student_logprob_diff/mean"
GAP_POSITIVE_FRACTION = "self_distillation/teacher_student_logprob_diff/positive_frac"
GAP_POSITIVE_PART = "self_distillation/teacher_student_logprob_diff/positive_part"
GAP_NEGATIVE_PART = "self_distillation/teacher_student_logprob_diff/negative_part"
TEACHER_ENTROPY = "self_distillation/teacher_entropy"
IS_RATIO_MEAN = "self_distillation/is_ratio_mean"
IS_CLIP_FRACTION = "self_distillation/is_clip_fraction"
NONFINITE_SAMPLES = "self_distillation/nonfinite_samples"
STALENESS = "training/off_policy/trajectory_staleness/mean"

VAL_REWARD_FAILURES = "val-aux/reward/num_failures"
REF_KL = "actor/ref_kl"
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

DESCRIPTIONS: dict[str, str] = {
    STEP: "Number of the step, from 1; 0 is the evaluation before training.",
    EPOCH: "Passes over the training rows so far, as a fraction.",
    SCORE_MEAN: "Mean score of the step's rollouts.",
    SCORE_MAX: "Highest score of the step's rollouts.",
    SCORE_MIN: "Lowest score of the step's rollouts.",
    REWARD_FAILURES: "Rollouts on which the grader failed: they teach nothing, and no mean has them.",
    ADVANTAGES_MEAN: "Mean group-relative advantage over response tokens (only if policy_loss_weight > 0).",
    LOSS: "The loss that was differentiated, summed over the micro-batches of a mini-batch, mean over mini-batches.",
    PG_LOSS: "Its GRPO part, before policy_loss_weight (only if policy_loss_weight > 0).",
    PG_CLIPFRAC: "Share of response tokens where PPO's clip took the gradient away (only if policy_loss_weight > 0).",
    PPO_KL: "Estimate of KL(old policy || student), mean of log old - log student over response tokens.",
    KL_LOSS: "Estimate of KL(student || initial model) by kl_loss_type, aggregated as the loss is, before its "
    "coefficient (only if kl_loss_coef > 0).",
    KL_COEF: "That coefficient (only if kl_loss_coef > 0).",
    ENTROPY: "Entropy of the student's next-token distribution, in nats, mean over response tokens.",
    GRAD_NORM: "Global gradient norm before clipping, mean over mini-batches.",
    LR: "Learning rate of the step's last optimizer step.",
    SKIPPED_UPDATES: "Optimizer steps left out because the gradient was not finite.",
    UPDATE_ROUNDING: "Share of the optimizer's update that rounding took from bfloat16 weights, on a sample of them "
    "(only where those are trained).",
    RESPONSE_LENGTH_MEAN: "Mean response length in tokens, end-of-sequence included.",
    RESPONSE_LENGTH_MAX: "Longest response.",
    RESPONSE_LENGTH_CLIP_RATIO: "Share of responses cut off at rollout.max_response_length.",
    REPEATED_4GRAMS: "Share of a response's 4-grams of tokens that stood in it before, mean over responses with any.",
    PROMPT_LENGTH_MEAN: "Mean prompt length in tokens.",
    PROMPT_LENGTH_MAX: "Longest prompt.",
    ROLLOUT_IS_MEAN: "Mean truncated importance weight old policy / sampler over response tokens.",
    ROLLOUT_IS_CLIP_FRACTION: "Share of weights that were truncated.",
    ROLLOUT_KL: "Estimate of KL(sampler || old policy), mean of log sampler - log old over response tokens.",
    DISTILLATION_LOSS: "The distillation loss, before coefficient and blend (only if policy_loss_weight < 1).",
    DIVERGENCE: "Mean divergence of a distilled token in nats, before ratios and weights.",
    DISTILLATION_COEF: "The weight of the distillation part: as scheduled, times what alarms made of it.",
    REPROMPT_FRACTION: "Fraction of samples that were distilled: the teacher was shown a demonstration or feedback.",
    ROLLOUT_SUCCESS_FRACTION: "Fraction of scored samples with a score of at least success_reward_threshold.",
    SUCCESS_GROUP_FRACTION: "Fraction of prompts with at least one such sample.",
    SUCCESS_SAMPLE_FRACTION: "Fraction of samples with a successful rollout as demonstration "
    "(demonstration_source=successful_rollout or successful_rollout_then_ground_truth).",
    SOLUTION_FRACTION: "Fraction of samples with a demonstration from any source.",
    FEEDBACK_AVAILABLE_FRACTION: "Fraction of samples for which the grader returned feedback.",
    FEEDBACK_FRACTION: "Fraction of samples whose teacher was shown feedback.",
    TRUNCATED_FRACTION: "Fraction of samples whose demonstration or feedback was truncated to max_reprompt_len.",
    OVERLONG_FRACTION: "Fraction of samples left out because even an empty demonstration did not fit.",
    TEACHER_GAP: "Mean of teacher minus student log-probability of the sampled tokens, over distilled tokens.",
    GAP_POSITIVE_FRACTION: "Share of distilled tokens that the teacher finds likelier than the student does.",
    GAP_POSITIVE_PART: "What those tokens contribute to the gap: mean of max(gap, 0) over distilled tokens.",
    GAP_NEGATIVE_PART: "What the others do: mean of min(gap, 0) over distilled tokens. The two add up to the gap.",
    TEACHER_ENTROPY: "Entropy of the teacher's next-token distribution in nats, mean over distilled tokens.",
    IS_RATIO_MEAN: "Mean truncated ratio student / old policy over distilled tokens.",
    IS_CLIP_FRACTION: "Share of distilled tokens whose ratio was truncated at is_clip.",
    NONFINITE_SAMPLES: "Samples dropped because a number of theirs was not finite.",
    STALENESS: "Weight updates between sampling and training.",
    VAL_REWARD_FAILURES: "Held-out responses on which the grader failed: no mean has them.",
    REF_KL: "Estimate of KL(student || initial model), mean of log student - log initial over response tokens, "
    "before the step's update (only if health.ref_kl_interval > 0).",
    NUM_WARNINGS: "Alarms raised at this step.",
    TEACHER_FROZEN: "1 once an alarm has frozen the teacher.",
    TIME_SAMPLE: "Seconds the sampler spent on the step's rollouts.",
    TIME_WAIT: "Seconds the actor waited for them.",
    TIME_LEARN: "Seconds of forward, backward, optimizer and teacher update.",
    TIME_WEIGHTS: "Seconds to hand the weights to the sampler.",
    TIME_EVAL: "Seconds of evaluation.",
    TIME_SAVE: "Seconds to write a checkpoint.",
    TIME_STEP: "Seconds of the whole step.",
    TOKENS: "Prompt and response tokens of the step's rollouts.",
    THROUGHPUT: "Those tokens per second and device.",
}


# Metrics with an interval beside them; so have all held-out ones.
ESTIMATES = (
    SCORE_MEAN,
    ENTROPY,
    RESPONSE_LENGTH_MEAN,
    RESPONSE_LENGTH_CLIP_RATIO,
    REPEATED_4GRAMS,
    REPROMPT_FRACTION,
    ROLLOUT_SUCCESS_FRACTION,
    SUCCESS_GROUP_FRACTION,
    TEACHER_GAP,
    REF_KL,
)


def ci95_names(metric: str) -> tuple[str, str]:
    """Names of the two ends of its 95 % interval."""
    return f"{metric}/ci95_low", f"{metric}/ci95_high"


def find_score(values: Mapping[str, float]) -> float | None:
    """The held-out accuracy by which checkpoints are compared, mean over data sources; None without one.

    Of each data source the one of ``find_accuracies``: greedy where there is a greedy evaluation.
    """
    found = [float(values[val_name(source, statistic)]) for source, statistic in find_accuracies(values).items()]
    return sum(found) / len(found) if found else None


def find_accuracies(names: Iterable[str]) -> dict[str, str]:
    """Data source -> statistic of its headline accuracy: ``mean@1``, or the mean over the fewest samples there is."""
    fewest: dict[str, int] = {}
    for name in names:
        if match := _ACCURACY.fullmatch(name):
            source, num_samples = match[1], int(match[2])
            fewest[source] = min(num_samples, fewest.get(source, num_samples))
    return {source: f"mean@{num_samples}" for source, num_samples in sorted(fewest.items())}


def val_name(data_source: str, statistic: str) -> str:
    """Name of a held-out accuracy of the student, e.g. ``val-core/hidden_rule/acc/mean@1`` (greedy)."""
    return f"val-core/{data_source}/acc/{statistic}"


_ACCURACY = re.compile(re.escape(val_name("SOURCE", "mean@")).replace("SOURCE", "(.+)") + r"(\d+)")


def teacher_prompted_name(data_source: str) -> str:
    """Share of held-out prompts whose teacher had something to be shown; the teacher's accuracy is over those."""
    return f"val-teacher/{data_source}/prompted_fraction"


def teacher_val_name(data_source: str, statistic: str) -> str:
    """The same for the teacher, prompted as it is in training."""
    return f"val-teacher/{data_source}/acc/{statistic}"


def teacher_gain_name(data_source: str) -> str:
    """Teacher minus student on the prompts whose teacher had something to be shown, one greedy response each."""
    return f"val-teacher/{data_source}/acc_minus_student/mean@1"
