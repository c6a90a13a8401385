"""Quantities of a mini-batch that need all ranks: token weights, the token budget, metrics."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id

from sdpo.algorithm.aggregation import compute_token_weights
from sdpo.algorithm.sums import Sums
from sdpo.verl_backend.worker.packing import (
    DISTILLATION_WEIGHTS,
    POLICY_WEIGHTS,
    SAMPLE_WEIGHTS,
    TEACHER_PROMPT_LENGTHS,
    count_response_tokens,
    pad_right,
)


def add_token_weights(data: TensorDict, loss_agg_mode: str, horizon: int, group: Any, rank: int) -> None:
    """Add the weight of one token of each sample, from the token counts of the mini-batch over all ranks.

    Args:
        data: this rank's part of the mini-batch.
        loss_agg_mode: how token losses become one number.
        horizon: the constant that ``seq-mean-token-sum-norm`` divides by.
        group: of the data-parallel ranks.
        rank: this rank's place in it.
    """
    num_tokens = pad_right(data["response_mask"]).bool().sum(1)
    counts = torch.stack([num_tokens, num_tokens * (data[TEACHER_PROMPT_LENGTHS] > 0)])
    gathered = gather_objects(counts.cpu(), group)
    start = sum(part.shape[1] for part in gathered[:rank])
    own = slice(start, start + counts.shape[1])
    policy, distillation = (
        compute_token_weights(part, loss_agg_mode, horizon)[own] for part in torch.cat(gathered, dim=1)
    )
    data[POLICY_WEIGHTS] = policy
    data[DISTILLATION_WEIGHTS] = distillation * data[SAMPLE_WEIGHTS]


def reserve_budget_for_teacher(data: TensorDict, group: Any) -> None:
    """With dynamic batches, lower verl's token budget by the fraction of the teacher's tokens.

    verl 0.9.1 counts the student's tokens alone: no upstream issue found (2026-11).
    """
    if not tu.get_non_tensor_data(data=data, key="use_dynamic_bsz", default=True):
        return
    lengths = data["input_ids"].offsets().diff()
    prompts = data[TEACHER_PROMPT_LENGTHS]
    teacher = int((prompts + (prompts > 0) * count_response_tokens(data)).sum())
    student = int(lengths.sum())
    budget = int(data["max_token_len_per_gpu"] * student / (student + teacher))
    # verl requires that the budget of each rank fits the longest sequence of all ranks.
    longest = max(gather_objects(int(lengths.max()), group))
    tu.assign_non_tensor(data, max_token_len_per_gpu=max(budget, longest))


def reduce_sums(sums: Sums, group: Any) -> dict[str, float]:
    """Return the metrics of a mini-batch over all ranks, from each rank's sums and counts."""
    # A rank without distilled samples lacks some of the names.
    names = sorted({name for own in gather_objects(list(sums), group) for name in own})
    zero = (torch.tensor(0.0), torch.tensor(0))
    pairs = [sums.get(name, zero) for name in names]
    table = torch.tensor([[float(total), float(count)] for total, count in pairs], dtype=torch.float64)
    table = table.to(get_device_id())
    dist.all_reduce(table, group=group)
    return {name: total / max(count, 1.0) for name, (total, count) in zip(names, table.tolist(), strict=True)}


def gather_objects(value: Any, group: Any) -> list[Any]:
    """Return every rank's value, in the ranks' order."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered
