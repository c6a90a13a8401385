"""The sampler in the trainer's process: ``collect`` samples, while training waits."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import nn

from sdpo.models.lora.adapters import MergedParameters
from sdpo.models.multimodal.processor import TokenPrompt
from sdpo.trainer.rollout.base import Engine, RolloutBatch
from sdpo.trainer.rollout.weight_sync import compute_weight_checksum


class LocalSampler:
    """Samples in the trainer's process.

    Args:
        verify_weights: send a checksum of the student with every weight sync.
    """

    def __init__(self, engine: Engine, *, verify_weights: bool = False) -> None:
        self._engine = engine
        self._verify_weights = verify_weights
        self._policy_version = 0
        self._request: tuple[Sequence[TokenPrompt], int] | None = None

    def submit(self, prompts: Sequence[TokenPrompt], seed: int) -> None:
        self._request = (prompts, seed)

    def collect(self, timeout: float | None = None) -> RolloutBatch:
        assert self._request is not None, "collect before submit"
        started = time.perf_counter()
        responses = self._engine.sample(*self._request)
        self._request = None
        return RolloutBatch(responses, self._policy_version, time.perf_counter() - started)

    def load_weights(self, student: nn.Module, policy_version: int) -> None:
        self._engine.load(MergedParameters(student), compute_weight_checksum(student) if self._verify_weights else None)
        self._policy_version = policy_version

    def close(self) -> None:
        self._engine.close()
