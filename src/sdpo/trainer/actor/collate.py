"""Samples as tensors: micro-batches under a token budget, packed where the model reads packed rows, else padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdpo.models.forward import PaddedSequences, compute_positions, pad_sequences
from sdpo.models.multimodal.processor import TokenPrompt
from sdpo.models.multimodal.vision_tower import VisionAdapter
from sdpo.models.packing.layout import AttentionCostModel, PackedSequences, PrefixGroup, group_by_prefix, pack_sequences
from sdpo.trainer.data.samples import TrainingSample


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of student and teacher reads. Packed tensors go response by response."""

    student: PaddedSequences | PackedSequences
    teacher: PaddedSequences | PackedSequences | None  # of the distilled samples only
    sampled_ids: Tensor  # [N]
    rollout_log_probs: Tensor  # [N]
    advantages: Tensor  # [N]
    distilled: Tensor  # [N] bool
    sample_index: Tensor  # [N] place of the token's sample in the micro-batch


class Collator:
    """Cuts samples into micro-batches and makes tensors of them.

    Args:
        pad_token_id: stands where a padded row has no token.
        device: of the tensors.
        vision: of the models that are to read them, where those read images.
        cost: what reading packed rows costs the model; None if it cannot, and rows are padded.
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
        """Cut samples into micro-batches that read at most ``max_tokens``, padding and the teacher's included.

        A sample longer than the budget stands alone. Padded samples of similar length go together; packed ones stay
        with the other rollouts of their prompt.

        Returns:
            Places in ``samples``, each exactly once.
        """
        if self.cost is None:
            return _split_padded(samples, max_tokens)
        pieces: list[list[int]] = []
        before = first = 0  # tokens of the prompts before the last one, and where in the piece that one's samples begin
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
        """Tensors of a few samples."""
        lengths = [len(s.response.token_ids) for s in samples]
        distilled = [s for s in samples if s.is_distilled]

        def repeat_by_token(values: Sequence[float]) -> Tensor:
            return torch.tensor(values).repeat_interleave(torch.tensor(lengths)).to(self.device)

        def flatten(lists: Sequence[Sequence[float]]) -> Tensor:
            return torch.tensor([value for values in lists for value in values], device=self.device)

        return MicroBatch(
            student=self._pack_or_pad(samples, [s.prompt.tokens for s in samples]),
            teacher=self._pack_or_pad(distilled, _get_teacher_prompts(distilled)) if distilled else None,
            sampled_ids=flatten([s.response.token_ids for s in samples]),
            rollout_log_probs=flatten([s.response.log_probs for s in samples]),
            advantages=repeat_by_token([s.advantage for s in samples]),
            distilled=repeat_by_token([s.is_distilled for s in samples]),
            sample_index=repeat_by_token(range(len(samples))),
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
        """What student and teacher read of these samples, packed."""
        distilled = [s for s in samples if s.is_distilled]
        groups = self._group_by_prefix(samples, [s.prompt.tokens for s in samples])
        groups += self._group_by_prefix(distilled, _get_teacher_prompts(distilled))
        return sum(group.num_tokens for group in groups)

    def _image_token_ids(self) -> Sequence[int]:
        return (self.vision.image_token_id,) if self.vision is not None else ()


def _get_teacher_prompts(distilled: Sequence[TrainingSample]) -> list[TokenPrompt]:
    """The teacher is shown the student's images, whatever else it is shown."""
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
