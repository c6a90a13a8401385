"""Failed rewards on verl: counted, limited, and excluded from baselines and means.

verl carries a score and a dictionary for each response. A failed reward has score 0 and its reason in the dictionary
(``rollout/agent_workers.py``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from sdpo.algorithm.advantage import compute_group_advantages
from sdpo.errors import DataError
from sdpo.observability import metrics

FAILURE = "reward_failure"  # the reason; empty for a scored response
REFUSAL = "reward_refusal"  # the task's error about its data, which ends the run; empty for other failures


def check_failures(extras: Sequence[Mapping[str, Any]], config: DictConfig, batch: str) -> list[bool]:
    """Return for each response whether its reward failed, and print how many did.

    Args:
        extras: the responses' dictionaries.
        config: verl's.
        batch: name of the batch, for messages.

    Raises:
        DataError: the task refuses its data, or more than ``reward.max_failure_fraction`` of the rewards failed.
    """
    failures = [extra.get(FAILURE) or "" for extra in extras]
    for extra in extras:
        if extra.get(REFUSAL):
            raise DataError(extra[REFUSAL])
    reasons = [reason for reason in failures if reason]
    if reasons:
        message = f"scoring failed for {len(reasons)} of {len(failures)} responses of {batch}"
        if len(reasons) > config.data.max_failure_fraction * len(failures):
            raise DataError(
                f"data.task: {message}, more than reward.max_failure_fraction={config.data.max_failure_fraction:g}; "
                f"the last: {reasons[-1]}"
            )
        print(f"data.task: {message}, which are left out; the last: {reasons[-1]}")
    return [bool(reason) for reason in failures]


def replace_scores(values: MutableMapping[str, Any], scores: Sequence[float], config: DictConfig) -> None:
    """Replace verl's score metrics, which count a failed reward as 0, in place.

    Args:
        values: metrics of a step.
        scores: of the step's responses; NaN for a failed reward.
        config: verl's.
    """
    scored = [score for score in scores if not math.isnan(score)]
    values[metrics.REWARD_FAILURES] = len(scores) - len(scored)
    if len(scored) == len(scores):
        return
    own: dict[str, float] = {}
    if scored:
        own = {
            metrics.SCORE_MEAN: sum(scored) / len(scored),
            metrics.SCORE_MAX: max(scored),
            metrics.SCORE_MIN: min(scored),
        }
    for name in (metrics.SCORE_MEAN, metrics.SCORE_MAX, metrics.SCORE_MIN):
        names = [name] if config.algorithm.use_kl_in_reward else [name, name.replace("/score/", "/rewards/")]
        for each in names:
            values.pop(each, None)
            if own:
                values[each] = own[name]


def correct_advantages(
    advantages: Sequence[Tensor],
    masks: Sequence[Tensor],
    rewards: Tensor,
    failed: Sequence[bool],
    groups: Sequence[Hashable],
    config: DictConfig,
) -> list[Tensor]:
    """Return advantages [T] of each response: of the GRPO estimator the native trainer's, of others 0 for a failure.

    verl's GRPO estimator counts a failed reward as a score, divides the rounding errors of equal scores by their
    deviation, and keeps the raw score of a response without others in its group.

    Args:
        advantages: [T] of each response, computed by verl with a reward of 0 for each failed one.
        masks: [T] of each response, 1 at the tokens of the policy.
        rewards: [B].
        failed: [B], whether the reward failed.
        groups: [B], equal for all responses to a prompt.
        config: verl's.
    """
    if config.algorithm.adv_estimator != "grpo":
        return [values * (not is_failed) for values, is_failed in zip(advantages, failed, strict=True)]
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    index = torch.tensor([numbers[group] for group in groups], dtype=torch.long)
    scores = rewards.masked_fill(torch.tensor(failed, dtype=torch.bool), math.nan)
    own = compute_group_advantages(scores, index, norm_by_std=config.algorithm.norm_adv_by_std_in_grpo)
    return [value * mask.float() for value, mask in zip(own, masks, strict=True)]


class FailedRewardsMixin:
    """Validation hook of all trainers: exclude failed rewards and count them."""

    config: DictConfig
    global_steps: int

    def _val_metrics_update(
        self,
        data_sources: Sequence[str],
        sample_uids: Sequence[str],
        reward_extra_infos_dict: dict[str, list[Any]],
        sample_turns: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        infos = dict(reward_extra_infos_dict)
        none = [""] * len(sample_uids)
        reasons = {name: infos.pop(name, none) for name in (FAILURE, REFUSAL)}
        extras = [dict(zip(reasons, each, strict=True)) for each in zip(*reasons.values(), strict=True)]
        failed = check_failures(extras, self.config, f"the validation at step {self.global_steps}")
        kept = [number for number, is_failed in enumerate(failed) if not is_failed]
        expected = kwargs.get("expected_acc_counts")
        if expected:  # V1 counts a missing response as wrong
            lost = Counter((str(data_sources[i]), str(sample_uids[i])) for i, each in enumerate(failed) if each)
            kwargs["expected_acc_counts"] = {key: count - lost[key] for key, count in expected.items()}
        values: dict[str, Any] = super()._val_metrics_update(  # type: ignore[misc]
            [data_sources[i] for i in kept],
            [sample_uids[i] for i in kept],
            {name: [each[i] for i in kept] for name, each in infos.items()},
            sample_turns,
            **kwargs,
        )
        return values | {metrics.VAL_REWARD_FAILURES: sum(failed)}
