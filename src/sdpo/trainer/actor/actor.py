"""The actor: student, teacher and optimizer, with one call per training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sdpo.algorithm.aggregation import compute_distillation_coef, compute_token_weights
from sdpo.algorithm.batch import TokenBatch
from sdpo.algorithm.importance_sampling import compute_rollout_ratio
from sdpo.algorithm.regularization import Regularization
from sdpo.algorithm.sums import Sums, add_sums, mean_of
from sdpo.algorithm.teacher import Teacher
from sdpo.config.actor import ActorConfig
from sdpo.config.monitoring import HealthConfig
from sdpo.config.rollout import RolloutCorrectionConfig
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.kernels.chunked_log_probs import LinearHead
from sdpo.kernels.dispatch import fused_linear_sdpo_loss
from sdpo.kernels.fused_linear_loss import FusedOutputs
from sdpo.models.multimodal.feature_cache import ImageFeatureCache
from sdpo.observability import metrics
from sdpo.observability.confidence import ClusteredMean, name_interval
from sdpo.trainer.actor.collate import Collator, MicroBatch
from sdpo.trainer.actor.forward import PolicyForward
from sdpo.trainer.actor.log_probs import LogProbs, compute_log_probs, estimate_reference_kl
from sdpo.trainer.actor.oom import TokenBudget
from sdpo.trainer.actor.optimization import Optimization
from sdpo.trainer.actor.schedule import StepSchedule
from sdpo.trainer.actor.statistics import add_by_prompt, average_mini_batches
from sdpo.trainer.data.samples import TrainingSample
from sdpo.trainer.rollout.weight_sync import copy_parameters


class Actor:
    """Trains the student on scored samples; ``build_actor`` makes one from a config.

    Args:
        student: the trained model.
        teacher: its teacher; None if nothing is distilled (``policy_loss_weight=1``).
        initial: the reference model, if a metric or loss reads it or it may become the teacher.
        forward: forward passes of student and teacher.
        collator: builds tensors from samples.
        budget: tokens per micro-batch.
        optimization: optimizer and learning rate schedule.
        config, loss, correction, health: config sections.
        schedule: sizes of mini-batches and lengths of the run.

    Attributes:
        version: number of completed training steps.
        distillation_scale: factor of the scheduled distillation coefficient; health checks reduce it.
        best: trained weights of the student at its best evaluation so far; None without a copy.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher | None,
        initial: nn.Module | None,
        *,
        forward: PolicyForward,
        collator: Collator,
        budget: TokenBudget,
        optimization: Optimization,
        config: ActorConfig,
        loss: SelfDistillationConfig,
        correction: RolloutCorrectionConfig,
        schedule: StepSchedule,
        health: HealthConfig,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.initial = initial
        self.device = student.device
        self.forward = forward
        self.collator = collator
        self.budget = budget
        self.optimization = optimization
        self.optimizer = optimization.optimizer
        self.config = config
        self.loss = loss
        self.correction = correction
        self.schedule = schedule
        self.regularization = Regularization(config.kl_loss_coef or None, config.kl_loss_type, config.entropy_coeff)
        self.version = 0
        self.distillation_scale = 1.0
        self.best: dict[str, Tensor] | None = None
        self._health = health

    # --- one training step

    def update_policy(
        self, samples: Sequence[TrainingSample], before_update: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Train on every sample once, with one optimizer step per mini-batch, then update the teacher.

        Args:
            samples: ``n`` consecutive samples per prompt; samples without a score are excluded.
            before_update: called before weights change. Between this call and the return, weights are inconsistent;
                do not save a checkpoint.

        Returns:
            The step's metrics.
        """
        step = self.version + 1
        minis = self.schedule.split_into_mini_batches(samples)
        images = self.forward.step_images()
        # With one optimizer step, the student equals the old policy, so its own forward pass provides old_log_probs.
        old = self.compute_log_probs(samples, images) if len(minis) > 1 else None
        has_kl_loss, measures_kl = self.config.kl_loss_coef > 0, self.schedule.measures_reference_kl(step)
        initial = self.compute_log_probs(samples, images, self.initial) if has_kl_loss or measures_kl else None
        values = {}
        if initial is not None and measures_kl:
            values = estimate_reference_kl(samples, old or self.compute_log_probs(samples, images), initial)
        log_probs = LogProbs(old, initial if has_kl_loss else None)
        coef = compute_distillation_coef(self.loss, step, self.schedule.max_steps) * self.distillation_scale
        results = [
            self._train_mini_batch([samples[i] for i in mini], log_probs.select(mini), coef, images, before_update)
            for mini in minis
        ]
        self.optimizer.zero_grad(set_to_none=True)  # frees memory for sampling
        if self.teacher is not None:
            self.teacher.update(self.student)
        self.version = step
        values = average_mini_batches(results) | values
        if self.loss.distills:
            values[metrics.DISTILLATION_COEF] = coef
        if has_kl_loss:
            values[metrics.KL_COEF] = self.config.kl_loss_coef
        return values

    def compute_log_probs(
        self,
        samples: Sequence[TrainingSample],
        images: ImageFeatureCache | None = None,
        model: nn.Module | None = None,
    ) -> list[Tensor]:
        """Log-probabilities of each sample's response tokens under the current student, or under ``model``."""
        images = images or self.forward.step_images()
        return compute_log_probs(self.forward, self.collator, self.budget, samples, images, model)

    def _train_mini_batch(
        self,
        samples: list[TrainingSample],
        log_probs: LogProbs,
        coef: float,
        images: ImageFeatureCache | None,
        before_update: Callable[[], None],
    ) -> dict[str, float]:
        num_dropped = 0
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            if images is not None:
                images.clear_gradients()
            spreads = {metrics.ENTROPY: ClusteredMean(), metrics.LOGPROB_DIFF_MEAN: ClusteredMean()}
            try:
                sums, nonfinite = self._accumulate_gradients(samples, log_probs, coef, images, spreads)
            except (RuntimeError, MemoryError) as error:
                self.budget.halve_on_oom(error, samples)
                continue
            if not nonfinite:
                break
            # A masked NaN still reaches the gradients, so the mini-batch is computed again without these samples.
            num_dropped += len(nonfinite)
            kept = [i for i in range(len(samples)) if i not in nonfinite]
            samples = [samples[i] for i in kept]
            log_probs = log_probs.select(kept)
        values = {name: float(total) / max(int(count), 1) for name, (total, count) in sums.items()}
        for name, spread in spreads.items():
            values |= name_interval(name, spread.normal_interval())
        values |= {metrics.NONFINITE_SAMPLES: float(num_dropped), metrics.LR: self.optimization.lr}
        before_update()
        values |= self._update()
        if images is not None:
            images.clear_student()
        return values

    def _accumulate_gradients(
        self,
        samples: Sequence[TrainingSample],
        log_probs: LogProbs,
        coef: float,
        images: ImageFeatureCache | None,
        spreads: dict[str, ClusteredMean],
    ) -> tuple[Sums, set[int]]:
        """Accumulate the gradients of a mini-batch.

        Returns:
            Sums for metrics, and indices of the first micro-batch's non-finite samples, at which accumulation stops.
        """
        mode, horizon = self.config.loss_agg_mode, self.schedule.horizon
        lengths = torch.tensor([len(s.response.token_ids) for s in samples])
        distilled = torch.tensor([s.is_distilled for s in samples], dtype=torch.bool)
        policy_weights = compute_token_weights(lengths, mode, horizon)
        distillation_weights = compute_token_weights(lengths * distilled, mode, horizon)
        distillation_weights = distillation_weights * torch.tensor([s.distillation_weight for s in samples])
        sums: Sums = {}
        for piece in self.budget.split(samples):
            batch = self.collator.collate([samples[i] for i in piece])
            weights = [w[piece].to(self.device)[batch.sample_index] for w in (policy_weights, distillation_weights)]
            outputs, more = self._compute_loss(batch, log_probs.select(piece), weights[0], weights[1], coef, images)
            checked = (outputs.token_losses, outputs.student_log_probs, batch.rollout_log_probs)
            broken = ~torch.stack([torch.isfinite(values) for values in checked]).all(0)
            if bool(broken.any()):
                return sums, {piece[i] for i in batch.sample_index[broken].unique().tolist()}
            outputs.loss.backward()
            add_sums(sums, {**metrics.name_loss_sums(outputs.sums), **more})
            prompts = [id(samples[i].prompt) for i in piece]
            add_by_prompt(spreads[metrics.ENTROPY], outputs.student_entropies, batch.sample_index, prompts)
            if batch.teacher is not None:
                gap = outputs.teacher_log_probs - outputs.student_log_probs[batch.distilled]
                add_by_prompt(spreads[metrics.LOGPROB_DIFF_MEAN], gap, batch.sample_index[batch.distilled], prompts)
        if images is not None:
            images.backward()
        return sums, set()

    def _compute_loss(
        self,
        batch: MicroBatch,
        log_probs: LogProbs,
        policy_weights: Tensor,
        distillation_weights: Tensor,
        coef: float,
        images: ImageFeatureCache | None,
    ) -> tuple[FusedOutputs, Sums]:
        student = self.forward.read_student(batch, images)
        teacher = self._read_teacher(batch, images)
        old, ref = log_probs.pack()
        level = self.correction.rollout_is
        if level == "sequence" and old is None:
            old = self.forward.score(student, batch)  # the weight of a token needs all tokens of its sequence
        # If old is None, the student is the old policy; the loss computes its log-probabilities.
        weights = self._compute_rollout_is_weights(old, batch)[0] if old is not None else None
        outputs = fused_linear_sdpo_loss(
            student,
            teacher,
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
                distillation_coef=coef,
                ref_log_probs=ref,
                regularization=self.regularization,
            ),
            self.loss,
            temperature=self.forward.temperature,
        )
        known = outputs.student_log_probs if old is None else old
        return outputs, self._compute_rollout_is_weights(known, batch)[1]

    @torch.no_grad()
    def _read_teacher(self, batch: MicroBatch, images: ImageFeatureCache | None) -> list[LinearHead]:
        if batch.teacher is None:
            return []
        assert self.teacher is not None
        mixture = self.teacher.policy(self.student)
        return [self.forward.read(module, batch.teacher, images, coefficient) for module, coefficient in mixture]

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

    def _update(self) -> dict[str, float]:
        return self.optimization.step()

    # --- actions of health checks

    @property
    def teacher_is_frozen(self) -> bool:
        """Whether ``freeze_teacher`` has been called."""
        return self.teacher is not None and self.teacher.kind != self.loss.teacher_regularization

    def reduce_distillation(self) -> None:
        """Reduce the distillation coefficient by the action ``reduce_weight``."""
        self.distillation_scale = self._health.reduce(self.distillation_scale)

    def snapshot_best(self) -> None:
        """Keep a copy of the student's trained weights, if freezing a live teacher would restore it."""
        if self._health.may_freeze and self.teacher is not None and self.teacher.module is None:
            self.best = {name: param.detach().clone() for name, param in self._trained_parameters()}

    @torch.no_grad()
    def freeze_teacher(self) -> None:
        """Stop the teacher's updates.

        A live teacher becomes the reference model, since a recent student may already have collapsed. The weights of
        the student's best evaluation are restored, since a collapsed student samples no successful rollouts.
        """
        if self.teacher is None:
            return
        if self.best is not None:
            for name, param in self._trained_parameters():
                param.copy_(self.best[name])
            self.best = None
        self.teacher.freeze(self.initial)

    def _trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, param) for name, param in self.student.named_parameters() if param.requires_grad]

    # --- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """State to resume from, without the weights of the student and of the teacher's module."""
        return {
            "version": self.version,
            "max_tokens_per_micro_batch": self.budget.max_tokens,
            **self.optimization.state_dict(),
            "teacher": self.teacher.state_dict() if self.teacher is not None else None,
            "distillation_scale": self.distillation_scale,
            "best": self.best,
        }

    def load_state_dict(self, state: Mapping[str, Any], teacher_module: nn.Module | None) -> None:
        """Restore ``state_dict``; the student's weights are loaded already.

        Args:
            teacher_module: weights of the teacher's module, if it has one.
        """
        self.distillation_scale, self.best, self.version = (
            state[name] for name in ("distillation_scale", "best", "version")
        )
        self.budget.max_tokens = min(self.budget.max_tokens, state["max_tokens_per_micro_batch"])
        self.optimization.load_state_dict(state)
        if self.teacher is not None:
            if state["teacher"]["kind"] != self.teacher.kind:
                self.teacher.freeze(self.initial)
            self.teacher.load_state_dict(state["teacher"])
            if self.teacher.module is not None and teacher_module is not None:
                copy_parameters(dict(teacher_module.named_parameters()), self.teacher.module)
