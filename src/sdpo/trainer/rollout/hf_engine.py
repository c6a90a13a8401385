"""Generation with a transformers model and this package's sampling loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sdpo.config.model import ModelConfig
from sdpo.models.generation.sampling import Completion, SamplingParams, sample_responses
from sdpo.models.loading import load_model
from sdpo.models.multimodal.processor import TokenPrompt, load_reader
from sdpo.models.multimodal.vision_tower import VisionAdapter
from sdpo.trainer.rollout.weight_sync import WeightChecksum, copy_parameters


class TransformersEngine:
    """Samples with a transformers model.

    Args:
        is_student: ``model`` is the student itself, so weight syncs copy nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        decoding: SamplingParams,
        vision: VisionAdapter | None = None,
        *,
        is_student: bool = False,
    ) -> None:
        self._model = model
        self._decoding = decoding
        self._vision = vision
        self._is_student = is_student

    @classmethod
    def from_config(
        cls, config: ModelConfig, decoding: SamplingParams, device: torch.device, max_pixels: int
    ) -> TransformersEngine:
        """Load another copy of the model."""
        model, reader = load_model(config, device), load_reader(config, max_pixels)
        return cls(model, decoding, VisionAdapter(model, reader) if reader is not None else None)

    def sample(self, prompts: Sequence[TokenPrompt], seed: int) -> list[list[Completion]]:
        return sample_responses([(self._model, 1.0)], prompts, self._decoding, seed, self._vision)

    def load(self, parameters: Mapping[str, Tensor], checksum: WeightChecksum | None) -> None:
        if not self._is_student:
            copy_parameters(parameters, self._model)

    def close(self) -> None:
        pass
