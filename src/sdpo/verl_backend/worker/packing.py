"""verl's micro-batch as packed response tokens, the form that the loss reads.

verl hands the engine sequences without padding (nested), and what belongs to response tokens either padded on the right
(one-step-off) or nested (V1 trainers). A row predicts the token after it, so the response token ``t`` of a
sequence that ends at ``end`` with ``length`` response tokens is predicted by row ``end - length - 1 + t``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu

from sdpo.kernels.fused_linear_loss import TokenInputs

# Fields that the trainer adds to verl's batch, one entry a sample.
TEACHER_PROMPTS = "teacher_prompts"  # [B, L] token ids, padded on the right
TEACHER_PROMPT_LENGTHS = "teacher_prompt_lengths"  # [B]; 0: the sample is not distilled
SAMPLE_WEIGHTS = "distillation_sample_weights"  # [B]
DISTILLATION_COEF = "distillation_coef"  # [B], the same for all
# Fields that the engine adds to a mini-batch: what one response token of the sample counts.
POLICY_WEIGHTS = "policy_token_weights"  # [B]
DISTILLATION_WEIGHTS = "distillation_token_weights"  # [B]
SAMPLE_NUMBERS = "sample_numbers"  # [B] places in the mini-batch, by which samples of micro-batches are known again


@dataclass(frozen=True)
class PackedTokens:
    """The N counted response tokens of a micro-batch, and the teacher's sequences of its distilled samples.

    A token inside a response that verl's ``response_mask`` leaves out (a tool's output, a rejected sample) is none of
    the N, but stays in the sequences.
    """

    rows: Tensor  # [N] rows of the student's packed hidden states
    sample_numbers: Tensor  # [N] of the tokens' samples
    inputs: TokenInputs  # N of them, M distilled
    teacher_samples: list[int]  # which of the samples are distilled
    teacher_sequences: list[Tensor]  # token ids, one each distilled sample
    teacher_prompt_lengths: list[int]  # of these sequences
    teacher_rows: Tensor  # [M] rows of the teacher's packed hidden states


def pad_right(values: Tensor) -> Tensor:
    """[B, T] of values by response token, whichever way verl stores them."""
    return values.to_padded_tensor(0) if values.is_nested else values


def count_response_tokens(data: TensorDict) -> Tensor:
    """[B] tokens of each response, those that do not count included."""
    responses = data["responses"]
    if responses.is_nested:
        return responses.offsets().diff()
    return data["attention_mask"][:, data["prompts"].shape[1] :].sum(1)


def repair_position_ids(data: TensorDict) -> None:
    """Cut 3-D (M-RoPE) position ids into sequences again, which verl does wrongly when all of these are as long."""
    positions = data.get("position_ids")
    if positions is None or not positions.is_nested or positions.dim() != 3:
        return
    values, offsets = positions.values(), data["input_ids"].offsets()
    if values.shape == (4, offsets[-1]) and torch.equal(positions.offsets(), offsets):
        positions._ragged_idx = 2
        return
    # [sequences * 4, length], whatever verl has marked it as since
    parts = list(values.unflatten(0, (len(data), 4)).unbind())
    data["position_ids"] = tu.nested_tensor_from_tensor_list(parts, ragged_idx=2)


def drop_samples(data: TensorDict, numbers: Sequence[int]) -> TensorDict:
    """The mini-batch without the samples at these places, with as many rows as before: every rank needs its share.

    In their places stand copies of a sample that is kept, without a token that counts; what is not finite comes back
    through the backward pass wherever it is only masked.
    """
    kept = next(i for i in range(len(data)) if i not in set(numbers))
    rows = [kept if i in set(numbers) else i for i in range(len(data))]
    dropped = tu.index_select_tensor_dict(data, rows)
    for name in ("response_mask", "loss_mask"):
        mask = dropped.get(name)
        if mask is None:
            continue
        parts = list(mask.unbind()) if mask.is_nested else mask
        for i in numbers:
            parts[i] = torch.zeros_like(parts[i])
        dropped[name] = tu.nested_tensor_from_tensor_list(parts) if mask.is_nested else parts
    return dropped


def pack_tokens(data: TensorDict) -> PackedTokens:
    """Gather what the loss needs of a micro-batch that has been through ``token weights``."""
    token_ids, ends = data["input_ids"].values(), data["input_ids"].offsets()[1:]
    lengths = count_response_tokens(data)
    mask = pad_right(data["response_mask"]).bool()
    samples, positions = mask.nonzero(as_tuple=True)
    rows = (ends - lengths - 1)[samples] + positions

    def at_tokens(name: str) -> Tensor:
        return pad_right(data[name])[mask].float()

    prompt_lengths = data[TEACHER_PROMPT_LENGTHS]
    is_distilled = (prompt_lengths > 0) & mask.any(1)
    samples_distilled = is_distilled.nonzero()[:, 0].tolist()
    sequences, starts, total = [], torch.zeros_like(ends), 0
    for i in samples_distilled:
        prompt = data[TEACHER_PROMPTS][i, : int(prompt_lengths[i])]
        response = token_ids[int(ends[i] - lengths[i]) : int(ends[i])]
        sequences.append(torch.cat([prompt.to(token_ids.dtype), response]))
        starts[i] = total + len(prompt) - 1
        total += len(sequences[-1])
    distilled = is_distilled[samples]
    return PackedTokens(
        rows=rows,
        sample_numbers=data[SAMPLE_NUMBERS][samples],
        inputs=TokenInputs(
            sampled_ids=token_ids[rows + 1],
            old_log_probs=at_tokens("old_log_probs"),
            policy_weights=data[POLICY_WEIGHTS][samples],
            advantages=at_tokens("advantages"),
            rollout_is_weights=at_tokens("rollout_is_weights") if data.get("rollout_is_weights") is not None else None,
            distilled=distilled,
            distillation_weights=data[DISTILLATION_WEIGHTS][samples],
            distillation_coef=float(data[DISTILLATION_COEF][0]),
            ref_log_probs=at_tokens("ref_log_prob") if data.get("ref_log_prob") is not None else None,
        ),
        teacher_samples=samples_distilled,
        teacher_sequences=sequences,
        teacher_prompt_lengths=prompt_lengths[samples_distilled].tolist(),
        teacher_rows=(starts[samples] + positions)[distilled],
    )
