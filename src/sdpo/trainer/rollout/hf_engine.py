"""Generation with a transformers model and this package's sampling loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from sdpo.config.model import ModelConfig
from sdpo.config.rollout import RolloutConfig
from sdpo.models.generation.sampling import Completion, SamplingParams, sample_responses
from sdpo.models.loading import load_model
from sdpo.models.multimodal.processor import TokenPrompt, load_reader
from sdpo.models.multimodal.vision_tower import VisionAdapter
from sdpo.models.packing.support import enable_packing
from sdpo.trainer.rollout.weight_sync import WeightChecksum, copy_parameters


class TransformersEngine:
    """Samples with a transformers model.

    Args:
        is_student: ``model`` is the student itself, so weight syncs copy nothing.
    """

    reads_images: ClassVar[bool] = True
    verify_weights: ClassVar[bool] = False

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

    @staticmethod
    def require(device: torch.device) -> None:
        pass

    @classmethod
    def from_config(
        cls,
        config: RolloutConfig,
        model: ModelConfig,
        sampling: SamplingParams,
        device: torch.device,
        *,
        max_length: int,
        max_pixels: int,
    ) -> TransformersEngine:
        loaded, reader = load_model(model, device), load_reader(model, max_pixels)
        vision = VisionAdapter(loaded, reader) if reader is not None else None
        enable_packing(loaded, vision)  # no row is packed here, but decoding steps are those of the student's attention
        return cls(loaded, sampling, vision)

    def sample(self, prompts: Sequence[TokenPrompt], seed: int) -> list[list[Completion]]:
        return sample_responses([(self._model, 1.0)], prompts, self._decoding, seed, self._vision)

    def load(self, parameters: Mapping[str, Tensor], checksum: WeightChecksum | None) -> None:
        if not self._is_student:
            copy_parameters(parameters, self._model)

    def close(self) -> None:
        pass
