"""The loss of a micro-batch: forward passes of student and teacher, importance weights, fused loss."""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo.algorithm.batch import TokenBatch
from sdpo.algorithm.importance_sampling import compute_rollout_ratio
from sdpo.algorithm.regularization import Regularization
from sdpo.algorithm.sums import Sums, mean_of
from sdpo.algorithm.teacher import LogitMixture
from sdpo.config.rollout import RolloutCorrectionConfig
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.kernels.chunked_log_probs import LinearHead
from sdpo.kernels.dispatch import fused_linear_sdpo_loss
from sdpo.kernels.fused_linear_loss import FusedOutputs
from sdpo.models.multimodal.feature_cache import ImageFeatureCache
from sdpo.observability import metrics
from sdpo.trainer.actor.collate import MicroBatch
from sdpo.trainer.actor.forward import PolicyForward
from sdpo.trainer.actor.log_probs import LogProbs


class MicroBatchLoss:
    """Computes the loss of a micro-batch.

    Args:
        forward: forward passes of student and teacher.
        config, correction: config sections.
        regularization: KL and entropy terms.
    """

    def __init__(
        self,
        forward: PolicyForward,
        config: SelfDistillationConfig,
        correction: RolloutCorrectionConfig,
        regularization: Regularization,
    ) -> None:
        self.forward = forward
        self.config = config
        self.correction = correction
        self.regularization = regularization

    def compute(
        self,
        batch: MicroBatch,
        teacher: LogitMixture,
        log_probs: LogProbs,
        policy_weights: Tensor,
        distillation_weights: Tensor,
        distillation_coef: float,
        images: ImageFeatureCache | None,
    ) -> tuple[FusedOutputs, Sums]:
        """Return the loss, not yet backpropagated, and the sums of its metrics.

        Args:
            teacher: the teacher's models; read only if a sample of the batch is distilled.
            log_probs: of the micro-batch's samples, under the old policy and the reference model.
            policy_weights, distillation_weights: weight of each token in either term, [tokens].
            distillation_coef: factor of the distillation term.
            images: features of the step's images.
        """
        student = self.forward.read_student(batch, images)
        teacher_heads = self._read_teacher(batch, teacher, images)
        old, ref = log_probs.pack()
        level = self.correction.rollout_is
        if level == "sequence" and old is None:
            old = self.forward.score(student, batch)  # the weight of a token needs all tokens of its sequence
        # If old is None, the student is the old policy; the loss computes its log-probabilities.
        weights = self._compute_rollout_is_weights(old, batch)[0] if old is not None else None
        outputs = fused_linear_sdpo_loss(
            student,
            teacher_heads,
            TokenBatch(
                sampled_ids=batch.sampled_ids,
                old_log_probs=old,
                policy_weights=policy_weights,
                advantages=batch.advantages,
                rollout_is_weights=weights,
                rollout_log_probs=batch.rollout_log_probs if old is None and level == "token" else None,
                rollout_is_threshold=self.correction.rollout_is_threshold,
                distilled=batch.distilled,
                distillation_weights=distillation_weights,
                distillation_coef=distillation_coef,
                ref_log_probs=ref,
                regularization=self.regularization,
            ),
            self.config,
            temperature=self.forward.temperature,
        )
        known = outputs.student_log_probs if old is None else old
        return outputs, self._compute_rollout_is_weights(known, batch)[1]

    @torch.no_grad()
    def _read_teacher(
        self, batch: MicroBatch, teacher: LogitMixture, images: ImageFeatureCache | None
    ) -> list[LinearHead]:
        if batch.teacher is None:
            return []
        return [self.forward.read(module, batch.teacher, images, coefficient) for module, coefficient in teacher]

    def _compute_rollout_is_weights(self, old: Tensor, batch: MicroBatch) -> tuple[Tensor | None, Sums]:
        """Truncated importance weights (old policy / sampling policy) of the tokens, and their metrics."""
        sums: Sums = {metrics.ROLLOUT_KL: mean_of(batch.rollout_log_probs - old)}
        ratio = compute_rollout_ratio(old, batch.rollout_log_probs, batch.sample_index, self.correction.rollout_is)
        if ratio is None:
            return None, sums
        threshold = self.correction.rollout_is_threshold
        weights = ratio.clamp(max=threshold)
        sums[metrics.ROLLOUT_IS_MEAN] = mean_of(weights)
        sums[metrics.ROLLOUT_IS_CLIP_FRACTION] = mean_of((ratio > threshold).to(weights.dtype))
        return weights, sums
