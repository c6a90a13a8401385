"""Log-probabilities of sampled tokens under the old policy and the reference model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdpo.models.multimodal.feature_cache import ImageFeatureCache
from sdpo.observability import metrics
from sdpo.observability.confidence import ClusteredMean, name_interval
from sdpo.trainer.actor.collate import Collator
from sdpo.trainer.actor.forward import PolicyForward
from sdpo.trainer.actor.oom import TokenBudget
from sdpo.trainer.actor.statistics import read_together
from sdpo.trainer.data.samples import TrainingSample


@dataclass(frozen=True)
class LogProbs:
    """Log-probabilities of each sample's response tokens under the old policy and the reference model.

    Attributes:
        old: under the old policy; None if the student has not changed since.
        ref: under the reference model; None without a KL loss.
    """

    old: list[Tensor] | None
    ref: list[Tensor] | None

    def select(self, indices: Sequence[int]) -> LogProbs:
        """Log-probabilities of some of the samples."""
        return LogProbs(*(None if many is None else [many[i] for i in indices] for many in (self.old, self.ref)))

    def pack(self) -> tuple[Tensor | None, Tensor | None]:
        """All samples' tokens in one tensor [N]."""
        old, ref = (None if many is None else torch.cat(many) for many in (self.old, self.ref))
        return old, ref


@torch.no_grad()
def compute_log_probs(
    forward: PolicyForward,
    collator: Collator,
    budget: TokenBudget,
    samples: Sequence[TrainingSample],
    images: ImageFeatureCache | None,
    model: nn.Module | None = None,
) -> list[Tensor]:
    """Log-probabilities of each sample's response tokens under the student, or under another model.

    Args:
        images: features of the samples' images, shared with other passes of the step.
        model: None for the student.
    """
    while True:
        try:
            return _compute_once(forward, collator, budget, samples, images, model)
        except (RuntimeError, MemoryError) as error:
            budget.halve_on_oom(error, samples)


def _compute_once(
    forward: PolicyForward,
    collator: Collator,
    budget: TokenBudget,
    samples: Sequence[TrainingSample],
    images: ImageFeatureCache | None,
    model: nn.Module | None,
) -> list[Tensor]:
    result: list[Tensor] = [torch.empty(0)] * len(samples)
    for piece in budget.split(samples):
        batch = collator.collate([samples[i] for i in piece])
        head = forward.read_student(batch, images) if model is None else forward.read(model, batch.student, images)
        lengths = [len(samples[i].response.token_ids) for i in piece]
        for i, values in zip(piece, forward.score(head, batch).split(lengths), strict=True):
            result[i] = values
    return result


def estimate_reference_kl(
    samples: Sequence[TrainingSample], student: Sequence[Tensor], initial: Sequence[Tensor]
) -> dict[str, float]:
    """Estimate KL(student || reference model) per token from the sampled tokens: unbiased, of either sign."""
    kl = ClusteredMean()
    totals = read_together([(ours - theirs).sum() for ours, theirs in zip(student, initial, strict=True)])
    for sample, (total,) in zip(samples, totals, strict=True):
        kl.add(id(sample.prompt), total, len(sample.response.token_ids))
    return {metrics.REF_KL: kl.mean} | name_interval(metrics.REF_KL, kl.normal_interval())
