"""verl's micro-batch as packed response tokens, the form that the loss reads.

verl passes sequences without padding (nested). Values of response tokens are padded on the right (one-step-off) or
nested (V1 trainers). A row predicts the next token: response token ``t`` of a sequence that ends at ``end`` with
``length`` response tokens is predicted by row ``end - length - 1 + t``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu

from sdpo.algorithm.batch import TokenBatch

# Fields that the trainer adds to verl's batch, one entry per sample.
TEACHER_PROMPTS = "teacher_prompts"  # [B, L] token ids, padded on the right
TEACHER_PROMPT_LENGTHS = "teacher_prompt_lengths"  # [B]; 0: the sample is not distilled
SAMPLE_WEIGHTS = "distillation_sample_weights"  # [B]
DISTILLATION_COEF = "distillation_coef"  # [B], the same for all
# Fields that the engine adds to a mini-batch: the weight of one response token of each sample.
POLICY_WEIGHTS = "policy_token_weights"  # [B]
DISTILLATION_WEIGHTS = "distillation_token_weights"  # [B]
SAMPLE_NUMBERS = "sample_numbers"  # [B] indices in the mini-batch, which identify the samples of micro-batches


@dataclass(frozen=True)
class PackedTokens:
    """The N counted response tokens of a micro-batch, and the teacher's sequences of its distilled samples.

    Tokens that verl's ``response_mask`` excludes (a tool's output, a rejected sample) are in the sequences, but not
    among the N.
    """

    rows: Tensor  # [N] rows of the student's packed hidden states
    sample_numbers: Tensor  # [N] sample number of each token
    inputs: TokenBatch  # of the N tokens, M of them distilled
    teacher_samples: list[int]  # indices of the distilled samples
    teacher_sequences: list[Tensor]  # token ids of each distilled sample
    teacher_prompt_lengths: list[int]  # of these sequences
    teacher_rows: Tensor  # [M] rows of the teacher's packed hidden states


def pad_right(values: Tensor) -> Tensor:
    """Return values per response token as [B, T], from either of verl's layouts."""
    return values.to_padded_tensor(0) if values.is_nested else values


def count_response_tokens(data: TensorDict) -> Tensor:
    """Return [B], the tokens of each response, including masked tokens."""
    responses = data["responses"]
    if responses.is_nested:
        return responses.offsets().diff()
    return data["attention_mask"][:, data["prompts"].shape[1] :].sum(1)


def drop_samples(data: TensorDict, numbers: Sequence[int]) -> TensorDict:
    """Replace the samples with these numbers by masked copies of a sample that is kept.

    The number of rows stays the same on every rank. Masking the samples alone is not enough, since NaN times 0 is NaN
    in the backward pass.
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
    """Gather the loss's inputs from a micro-batch to which ``add_token_weights`` has been applied."""
    token_ids, ends = data["input_ids"].values(), data["input_ids"].offsets()[1:]
    lengths = count_response_tokens(data)
    mask = pad_right(data["response_mask"]).bool()
    samples, positions = mask.nonzero(as_tuple=True)
    rows = (ends - lengths - 1)[samples] + positions

    def read_per_token(name: str) -> Tensor:
        return pad_right(data[name])[mask].float()

    def read_if_present(name: str) -> Tensor | None:
        return None if data.get(name) is None else read_per_token(name)

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
        inputs=TokenBatch(
            sampled_ids=token_ids[rows + 1],
            old_log_probs=read_per_token("old_log_probs"),
            policy_weights=data[POLICY_WEIGHTS][samples],
            advantages=read_per_token("advantages"),
            rollout_is_weights=read_if_present("rollout_is_weights"),
            distilled=distilled,
            distillation_weights=data[DISTILLATION_WEIGHTS][samples],
            distillation_coef=float(data[DISTILLATION_COEF][0]),
            ref_log_probs=read_if_present("ref_log_prob"),
        ),
        teacher_samples=samples_distilled,
        teacher_sequences=sequences,
        teacher_prompt_lengths=prompt_lengths[samples_distilled].tolist(),
        teacher_rows=(starts[samples] + positions)[distilled],
    )
