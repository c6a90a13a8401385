"""The actor: student, teacher and optimizer, with one call per training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sdpo.algorithm.aggregation import compute_distillation_coef, compute_token_weights
from sdpo.algorithm.regularization import Regularization
from sdpo.algorithm.teacher import Teacher
from sdpo.config.actor import ActorConfig
from sdpo.config.rollout import RolloutCorrectionConfig
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.models.multimodal.feature_cache import ImageFeatureCache
from sdpo.observability import metrics
from sdpo.trainer.actor.collate import Collator
from sdpo.trainer.actor.forward import PolicyForward
from sdpo.trainer.actor.log_probs import LogProbs, compute_log_probs, estimate_reference_kl
from sdpo.trainer.actor.micro_batch_loss import MicroBatchLoss
from sdpo.trainer.actor.oom import TokenBudget
from sdpo.trainer.actor.optimization import Optimization
from sdpo.trainer.actor.schedule import StepSchedule
from sdpo.trainer.actor.statistics import MiniBatchStatistics, average_mini_batches, sum_by_sample
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
        config, loss, correction: config sections.
        schedule: sizes of mini-batches and lengths of the run.

    Attributes:
        version: number of completed training steps.
        distillation_scale: factor of the scheduled distillation coefficient; health checks reduce it.
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
        self.schedule = schedule
        regularization = Regularization(config.kl_loss_coef or None, config.kl_loss_type, config.entropy_coeff)
        self.micro_batch_loss = MicroBatchLoss(forward, loss, correction, regularization)
        self.version = 0
        self.distillation_scale = 1.0

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
            statistics = MiniBatchStatistics()
            try:
                self._accumulate_gradients(samples, log_probs, coef, images, statistics)
                values, nonfinite = statistics.read()
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
        statistics: MiniBatchStatistics,
    ) -> None:
        """Accumulate the gradients of a mini-batch, and the sums of its metrics in ``statistics``."""
        mode, horizon = self.config.loss_agg_mode, self.schedule.horizon
        lengths = torch.tensor([len(s.response.token_ids) for s in samples])
        distilled = torch.tensor([s.is_distilled for s in samples], dtype=torch.bool)
        policy_weights = compute_token_weights(lengths, mode, horizon)
        distillation_weights = compute_token_weights(lengths * distilled, mode, horizon)
        distillation_weights = distillation_weights * torch.tensor([s.distillation_weight for s in samples])
        teacher = self.teacher.policy(self.student) if self.teacher is not None else ()
        for piece in self.budget.split(samples):
            batch = self.collator.collate([samples[i] for i in piece])
            weights = [w[piece].to(self.device)[batch.sample_index] for w in (policy_weights, distillation_weights)]
            outputs, more = self.micro_batch_loss.compute(
                batch, teacher, log_probs.select(piece), weights[0], weights[1], coef, images
            )
            checked = (outputs.token_losses, outputs.student_log_probs, batch.rollout_log_probs)
            broken = ~torch.stack([torch.isfinite(values) for values in checked]).all(0)
            statistics.add_nonfinite(sum_by_sample(broken.float(), batch.sample_index, len(piece))[0], piece)
            outputs.loss.backward()
            statistics.add({**metrics.name_loss_sums(outputs.sums), **more})
            prompts = [id(samples[i].prompt) for i in piece]
            entropies = sum_by_sample(outputs.student_entropies, batch.sample_index, len(piece))
            statistics.add_by_prompt(metrics.ENTROPY, entropies, prompts)
            if batch.teacher is not None:
                gap = outputs.teacher_log_probs - outputs.student_log_probs.index_select(0, batch.distilled_index)
                gaps = sum_by_sample(gap, batch.sample_index.index_select(0, batch.distilled_index), len(piece))
                statistics.add_by_prompt(metrics.LOGPROB_DIFF_MEAN, gaps, prompts)
        if images is not None:
            images.backward()

    def _update(self) -> dict[str, float]:
        return self.optimization.step()

    def state_dict(self) -> dict[str, Any]:
        """State to resume from, without the weights of the student and of the teacher's module."""
        return {
            "version": self.version,
            "max_tokens_per_micro_batch": self.budget.max_tokens,
            **self.optimization.state_dict(),
            "teacher": self.teacher.state_dict() if self.teacher is not None else None,
            "distillation_scale": self.distillation_scale,
        }

    def load_state_dict(self, state: Mapping[str, Any], teacher_module: nn.Module | None) -> None:
        """Restore ``state_dict``; the student's weights are loaded already.

        Args:
            teacher_module: weights of the teacher's module, if it has one.
        """
        self.distillation_scale, self.version = state["distillation_scale"], state["version"]
        self.budget.max_tokens = min(self.budget.max_tokens, state["max_tokens_per_micro_batch"])
        self.optimization.load_state_dict(state)
        if self.teacher is not None:
            if state["teacher"]["kind"] != self.teacher.kind:
                self.teacher.freeze(self.initial)
            self.teacher.load_state_dict(state["teacher"])
            if self.teacher.module is not None and teacher_module is not None:
                copy_parameters(dict(teacher_module.named_parameters()), self.teacher.module)
