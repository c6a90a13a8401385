"""Mini-batch size, number of steps and measurement interval of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdpo.trainer.data.samples import TrainingSample


@dataclass(frozen=True)
class StepSchedule:
    """Splits a step's samples into mini-batches and selects the steps that measure the reference KL.

    Attributes:
        mini_batch_size: samples per optimizer step.
        max_steps: steps of the run.
        horizon: maximum length of a response, in tokens (``seq-mean-token-sum-norm``).
        ref_kl_interval: steps between estimates of the KL divergence from the reference model; 0: none.
    """

    mini_batch_size: int
    max_steps: int
    horizon: int
    ref_kl_interval: int

    def split_into_mini_batches(self, samples: Sequence[TrainingSample]) -> list[list[int]]:
        """Indices of each mini-batch's scored samples."""
        size = self.mini_batch_size
        return [
            [j for j in range(i, min(i + size, len(samples))) if samples[j].is_scored]
            for i in range(0, len(samples), size)
        ]

    def measures_reference_kl(self, step: int) -> bool:
        """Whether this step, from 1, estimates the KL divergence from the reference model."""
        every = self.ref_kl_interval
        return every > 0 and (step == 1 or step % every == 0)
