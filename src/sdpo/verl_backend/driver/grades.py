"""Responses without a grade, on verl: counted, limited, compared with nothing and part of no mean.

verl carries a score for each response and a dictionary beside it. A failed grade is a score of 0 there, and says so in
the dictionary (``agent_workers.py``).
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

FAILURE = "reward_failure"  # why there is no grade; empty if there is one
REFUSAL = "reward_refusal"  # of these, what the task says of its data, which ends the run


def check_failures(extras: Sequence[Mapping[str, Any]], config: DictConfig, what: str) -> list[bool]:
    """Which responses have no grade, from their dictionaries; tells how many.

    Raises:
        DataError: the task refuses its data; or more than ``reward.max_failure_fraction`` of the responses failed.
    """
    failures = [extra.get(FAILURE) or "" for extra in extras]
    for extra in extras:
        if extra.get(REFUSAL):
            raise DataError(extra[REFUSAL])
    reasons = [reason for reason in failures if reason]
    if reasons:
        message = f"scoring failed for {len(reasons)} of {len(failures)} responses of {what}"
        if len(reasons) > config.data.max_failure_fraction * len(failures):
            raise DataError(
                f"data.task: {message}, which is more than reward.max_failure_fraction="
                f"{config.data.max_failure_fraction:g}; the last: {reasons[-1]}"
            )
        print(f"data.task: {message}, which costs them; the last: {reasons[-1]}")
    return [bool(reason) for reason in failures]


def replace_scores(values: MutableMapping[str, Any], scores: Sequence[float], config: DictConfig) -> None:
    """Put a step's metrics of its scores (NaN: failed) in the place of verl's, of which failed ones are 0; in place."""
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
    advantages: Tensor, rewards: Tensor, failed: Sequence[bool], groups: Sequence[Hashable], config: DictConfig
) -> Tensor:
    """[B] advantages of each response with the failed ones left out of their groups.

    Args:
        advantages: [B], as verl computes them from a reward of 0 for each failed response.
        rewards: [B].
        failed: [B].
        groups: [B], the same for all responses to a prompt.
    """
    mask = torch.tensor(failed, dtype=torch.bool)
    corrected = advantages.masked_fill(mask, 0.0)
    if config.algorithm.adv_estimator != "grpo":
        return corrected
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    index = torch.tensor([numbers[group] for group in groups])
    own = compute_group_advantages(
        rewards.masked_fill(mask, math.nan), index, norm_by_std=config.algorithm.norm_adv_by_std_in_grpo
    )
    is_affected = torch.isin(index, index[mask])
    return torch.where(is_affected, own.to(corrected.dtype), corrected)


class FailedRewardsMixin:
    """The hook of all trainers: an evaluation leaves out responses without a grade, and counts them."""

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
        told = {name: infos.pop(name, none) for name in (FAILURE, REFUSAL)}
        extras = [dict(zip(told, each, strict=True)) for each in zip(*told.values(), strict=True)]
        failed = check_failures(extras, self.config, f"the evaluation at step {self.global_steps}")
        kept = [number for number, is_failed in enumerate(failed) if not is_failed]
        expected = kwargs.get("expected_acc_counts")
        if expected:  # V1 takes a response that it misses for a wrong one
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
