"""Samples as padded tensors: micro-batches under a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdpo.algorithm.teacher import Policy
from sdpo.embedded.samples import Sample
from sdpo.embedded.step_images import StepImages
from sdpo.models.forward import PaddedSequences, compute_logits, pad_sequences
from sdpo.models.processing import TokenPrompt
from sdpo.models.vision import Vision


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of student and teacher reads. Packed tensors go response by response."""

    student: PaddedSequences
    teacher: PaddedSequences | None  # of the distilled samples only
    sampled_ids: Tensor  # [N]
    rollout_log_probs: Tensor  # [N]
    advantages: Tensor  # [N]
    distilled: Tensor  # [N] bool
    sample_index: Tensor  # [N] place of the token's sample in the micro-batch


def split_by_tokens(samples: Sequence[Sample], max_tokens: int) -> list[list[int]]:
    """Cut samples into micro-batches of at most ``max_tokens`` padded tokens, the teacher's included.

    Samples of similar length go together; a sample longer than the budget stands alone.

    Returns:
        Places in ``samples``, each exactly once.
    """

    def lengths(i: int) -> tuple[int, int, int]:
        sample = samples[i]
        teacher = len(sample.teacher_prompt.token_ids or ())
        return len(sample.prompt.token_ids), teacher, len(sample.response.token_ids)

    pieces: list[list[int]] = []
    longest = (0, 0, 0)
    for i in sorted(range(len(samples)), key=lambda i: sum(lengths(i))):
        grown = tuple(map(max, longest, lengths(i)))
        prompt, teacher, response = grown
        padded = prompt + response + (teacher + response if teacher else 0)
        if pieces and (len(pieces[-1]) + 1) * padded <= max_tokens:
            pieces[-1].append(i)
            longest = (prompt, teacher, response)
        else:
            pieces.append([i])
            longest = lengths(i)
    return pieces


def build_micro_batch(
    samples: Sequence[Sample], pad_token_id: int, device: torch.device, vision: Vision | None = None
) -> MicroBatch:
    """Tensors of a few samples; ``vision`` is of the models that are to read them, where those read images."""
    lengths = [len(s.response.token_ids) for s in samples]
    distilled = [s for s in samples if s.is_distilled]
    teacher = None
    if distilled:
        # The teacher is shown the student's images, whatever else it is shown.
        prompts = [TokenPrompt(s.teacher_prompt.token_ids or [], s.prompt.images) for s in distilled]
        teacher = pad_sequences(prompts, [s.response.token_ids for s in distilled], pad_token_id, device, vision)

    def repeat_by_token(values: Sequence[float]) -> Tensor:
        return torch.tensor(values).repeat_interleave(torch.tensor(lengths)).to(device)

    def flatten(lists: Sequence[Sequence[float]]) -> Tensor:
        return torch.tensor([value for values in lists for value in values], device=device)

    return MicroBatch(
        student=pad_sequences(
            [s.prompt.tokens for s in samples], [s.response.token_ids for s in samples], pad_token_id, device, vision
        ),
        teacher=teacher,
        sampled_ids=flatten([s.response.token_ids for s in samples]),
        rollout_log_probs=flatten([s.response.log_probs for s in samples]),
        advantages=repeat_by_token([s.advantage for s in samples]),
        distilled=repeat_by_token([s.is_distilled for s in samples]),
        sample_index=repeat_by_token(range(len(samples))),
    )


def compute_response_logits(
    policy: Policy, sequences: PaddedSequences, temperature: float, images: StepImages | None = None
) -> Tensor:
    """Logits [N, V] (float32) that predict each response token, over the sampling temperature.

    ``images`` has the features of the sequences' images, where the policy's models read images.
    """
    keep = sequences.response_mask.shape[1] + 1
    total: Tensor | None = None
    for module, coefficient in policy:
        logits = compute_logits(
            module,
            sequences.token_ids,
            sequences.attention_mask,
            sequences.position_ids,
            keep,
            vision=images.vision if images is not None else None,
            features=images.select(module, sequences.images) if images is not None else (),
        )
        logits = logits[:, :-1][sequences.response_mask].float() * (coefficient / temperature)
        total = logits if total is None else total + logits
    assert total is not None
    return total
