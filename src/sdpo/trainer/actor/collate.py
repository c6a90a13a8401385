"""Micro-batches of samples under a token budget: packed if the model supports it, else padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdpo.models.forward import PaddedSequences, compute_positions, pad_sequences
from sdpo.models.multimodal.processor import TokenPrompt
from sdpo.models.multimodal.vision_tower import VisionAdapter
from sdpo.models.packing.attention_plan import AttentionCostModel, PrefixGroup
from sdpo.models.packing.layout import PackedSequences, group_by_prefix, pack_sequences
from sdpo.trainer.data.samples import TrainingSample


@dataclass(frozen=True)
class MicroBatch:
    """Inputs of one forward pass of student and teacher; tensors of length N concatenate the responses' tokens."""

    student: PaddedSequences | PackedSequences
    teacher: PaddedSequences | PackedSequences | None  # of the distilled samples only
    sampled_ids: Tensor  # [N]
    rollout_log_probs: Tensor  # [N]
    advantages: Tensor  # [N]
    distilled: Tensor  # [N] bool
    distilled_index: Tensor  # [M] indices of the distilled tokens; a mask would need their number from the device
    sample_index: Tensor  # [N] index in the micro-batch of the token's sample


class Collator:
    """Splits samples into micro-batches and builds their tensors.

    Args:
        pad_token_id: fills padded rows.
        device: of the tensors.
        vision: of a vision-language model.
        cost: the model's attention cost of packed rows; None pads the rows, for models without support for packing.
    """

    def __init__(
        self,
        pad_token_id: int,
        device: torch.device,
        vision: VisionAdapter | None = None,
        cost: AttentionCostModel | None = None,
    ) -> None:
        self.pad_token_id = pad_token_id
        self.device = device
        self.vision = vision
        self.cost = cost

    def split(self, samples: Sequence[TrainingSample], max_tokens: int) -> list[list[int]]:
        """Split samples into micro-batches of at most ``max_tokens`` tokens, padding and the teacher's tokens included.

        A sample longer than the budget is a micro-batch by itself. Padding groups samples of similar length. Packing
        keeps the rollouts of a prompt together.

        Returns:
            Indices in ``samples``, each exactly once.
        """
        if self.cost is None:
            return _split_padded(samples, max_tokens)
        pieces: list[list[int]] = []
        before = 0  # tokens of the prompts before the piece's last prompt
        first = 0  # index in the piece of the last prompt's first sample
        for i, sample in enumerate(samples):
            if pieces and sample.prompt is not samples[pieces[-1][-1]].prompt:
                before += self._count_tokens([samples[j] for j in pieces[-1][first:]])
                first = len(pieces[-1])
            together = [samples[j] for j in pieces[-1][first:]] if pieces else []
            if pieces and before + self._count_tokens([*together, sample]) <= max_tokens:
                pieces[-1].append(i)
            else:
                pieces.append([i])
                before = first = 0
        return pieces

    def collate(self, samples: Sequence[TrainingSample]) -> MicroBatch:
        """Build the tensors of a micro-batch."""
        lengths = [len(s.response.token_ids) for s in samples]
        distilled = [s for s in samples if s.is_distilled]

        def repeat_by_token(values: Sequence[float]) -> Tensor:
            return torch.tensor(values).repeat_interleave(torch.tensor(lengths))

        def flatten(lists: Sequence[Sequence[float]]) -> Tensor:
            return torch.tensor([value for values in lists for value in values], device=self.device)

        is_distilled = repeat_by_token([s.is_distilled for s in samples])
        return MicroBatch(
            student=self._pack_or_pad(samples, [s.prompt.tokens for s in samples]),
            teacher=self._pack_or_pad(distilled, _get_teacher_prompts(distilled)) if distilled else None,
            sampled_ids=flatten([s.response.token_ids for s in samples]),
            rollout_log_probs=flatten([s.response.log_probs for s in samples]),
            advantages=repeat_by_token([s.advantage for s in samples]).to(self.device),
            distilled=is_distilled.to(self.device),
            distilled_index=is_distilled.nonzero()[:, 0].to(self.device),
            sample_index=repeat_by_token(range(len(samples))).to(self.device),
        )

    def _pack_or_pad(
        self, samples: Sequence[TrainingSample], prompts: Sequence[TokenPrompt]
    ) -> PaddedSequences | PackedSequences:
        responses = [s.response.token_ids for s in samples]
        if self.cost is None:
            return pad_sequences(prompts, responses, self.pad_token_id, self.device, self.vision)
        return pack_sequences(
            self._group_by_prefix(samples, prompts),
            prompts,
            responses,
            compute_positions(prompts, max(map(len, responses)), self.vision),
            self.cost,
            self.device,
            self._image_token_ids(),
        )

    def _group_by_prefix(self, samples: Sequence[TrainingSample], prompts: Sequence[TokenPrompt]) -> list[PrefixGroup]:
        assert self.cost is not None
        lengths, groups = [len(s.response.token_ids) for s in samples], [id(s.prompt) for s in samples]
        return group_by_prefix(prompts, lengths, groups, self.cost, self._image_token_ids())

    def _count_tokens(self, samples: Sequence[TrainingSample]) -> int:
        """Tokens of the packed samples, of student and teacher together."""
        distilled = [s for s in samples if s.is_distilled]
        groups = self._group_by_prefix(samples, [s.prompt.tokens for s in samples])
        groups += self._group_by_prefix(distilled, _get_teacher_prompts(distilled))
        return sum(group.num_tokens for group in groups)

    def _image_token_ids(self) -> Sequence[int]:
        return (self.vision.image_token_id,) if self.vision is not None else ()


def _get_teacher_prompts(distilled: Sequence[TrainingSample]) -> list[TokenPrompt]:
    """The teacher's prompts, with the images of the student's prompts."""
    return [TokenPrompt(s.teacher_prompt.token_ids or [], s.prompt.images) for s in distilled]


def _split_padded(samples: Sequence[TrainingSample], max_tokens: int) -> list[list[int]]:
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
