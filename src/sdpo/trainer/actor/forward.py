"""Forward passes of student and teacher, up to the output layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sdpo.kernels.chunked_log_probs import LinearHead
from sdpo.kernels.dispatch import score_tokens
from sdpo.models.forward import PaddedSequences, compute_hidden
from sdpo.models.multimodal.feature_cache import ImageFeatureCache
from sdpo.models.multimodal.vision_tower import VisionAdapter
from sdpo.models.output_head import build_linear_head, suppress_tokens
from sdpo.models.packing.layout import PackedSequences
from sdpo.models.training_mode import set_training_mode
from sdpo.trainer.actor.collate import MicroBatch


@dataclass(frozen=True)
class PolicyForward:
    """Computes hidden states with their output layer (``LinearHead``); the logits match those of sampling.

    Attributes:
        student: the trained model.
        vision: its vision adapter; None for a language model.
        suppressed_ids: tokens that the sampler never draws, without probability here too.
        logit_scale: factor between output layer and logits in this architecture.
        temperature: of the sampler, > 0.
        autocast: whether passes run in bfloat16 autocast.
        gradient_checkpointing: whether the student recomputes activations in the backward pass.
        trains_vision: whether the vision tower is trained.
    """

    student: PreTrainedModel
    vision: VisionAdapter | None
    suppressed_ids: Sequence[int]
    logit_scale: float
    temperature: float
    autocast: bool
    gradient_checkpointing: bool
    trains_vision: bool

    def step_images(self) -> ImageFeatureCache | None:
        """A new cache of image features for one step; None for a language model."""
        if self.vision is None:
            return None
        return ImageFeatureCache(
            self.vision.reader, student=self.student, frozen=not self.trains_vision, precision=self._precision
        )

    def read_student(self, batch: MicroBatch, images: ImageFeatureCache | None) -> LinearHead:
        """The student's hidden states of the response tokens [N, H], with gradient where it is enabled."""
        set_training_mode(self.student, checkpoints=self.gradient_checkpointing and torch.is_grad_enabled())
        return self.read(self.student, batch.student, images)

    def read(
        self,
        module: nn.Module,
        sequences: PaddedSequences | PackedSequences,
        images: ImageFeatureCache | None,
        coefficient: float = 1.0,
    ) -> LinearHead:
        """A model's hidden states of the response tokens [N, H]; its logits are multiplied by ``coefficient``."""
        features = images.select(module, sequences.images) if images is not None else ()
        with self._precision():
            hidden = compute_hidden(module, sequences, vision=self.vision, features=features)
        if self.autocast:
            hidden = hidden.bfloat16()  # as autocast does before the output layer
        if self.logit_scale != 1.0:
            hidden = hidden * self.logit_scale
        return suppress_tokens(build_linear_head(module, hidden, coefficient), self.suppressed_ids)

    def score(self, head: LinearHead, batch: MicroBatch) -> Tensor:
        """Log-probabilities [N] of the sampled tokens."""
        return score_tokens(head, batch.sampled_ids, temperature=self.temperature)[0]

    def _precision(self) -> torch.autocast:
        # Each weight is used once per pass, so autocast's cache would only hold a bfloat16 copy of the model.
        return torch.autocast(self.student.device.type, torch.bfloat16, enabled=self.autocast, cache_enabled=False)
