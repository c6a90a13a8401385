"""Interfaces of rollout sampling: a sampler schedules requests and weight syncs, its engine generates the responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from sdpo.config.model import ModelConfig
from sdpo.config.rollout import RolloutConfig
from sdpo.models.generation.sampling import Completion, SamplingParams
from sdpo.models.multimodal.processor import TokenPrompt
from sdpo.trainer.rollout.weight_sync import WeightChecksum


@dataclass(frozen=True)
class RolloutBatch:
    """Responses to the prompts of one step.

    Attributes:
        responses: one list of ``n`` responses per prompt.
        policy_version: number of training steps that the sampling weights had taken.
        seconds: duration of the sampling.
    """

    responses: list[list[Completion]]
    policy_version: int
    seconds: float


class Sampler(Protocol):
    """Samples rollouts with the latest synced weights. At most one request is in flight."""

    def submit(self, prompts: Sequence[TokenPrompt], seed: int) -> None:
        """Request rollouts of these prompts with the weights that were loaded last."""

    def collect(self, timeout: float | None = None) -> RolloutBatch | None:
        """Wait for the requested rollouts; None if another process has not sent them after ``timeout`` seconds."""

    def load_weights(self, student: nn.Module, policy_version: int) -> None:
        """Sync the student's weights; not allowed between ``submit`` and ``collect``."""

    def close(self) -> None:
        """Stop processes and free memory."""


class Engine(Protocol):
    """A model that generates responses; ``ENGINES`` in ``build.py`` lists the classes by name.

    Attributes:
        reads_images: whether it samples from models that read images.
        verify_weights: whether ``load`` needs a checksum to verify a weight sync.
    """

    reads_images: ClassVar[bool]
    verify_weights: ClassVar[bool]

    @staticmethod
    def require(device: torch.device) -> None:
        """Check that the engine's package is installed and supports the device.

        Raises:
            DataError: one of both is not the case.
        """

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
    ) -> Engine:
        """Load the model of the config for sampling.

        Args:
            max_length: of prompt and response, in tokens.
            max_pixels: of an image.
        """

    def sample(self, prompts: Sequence[TokenPrompt], seed: int) -> list[list[Completion]]:
        """Sample responses per prompt, in the prompts' order; deterministic for a seed."""

    def load(self, parameters: Mapping[str, Tensor], checksum: WeightChecksum | None) -> None:
        """Copy weights into the model, by parameter name; verify the result if a checksum is given."""

    def close(self) -> None:
        """Free memory."""
