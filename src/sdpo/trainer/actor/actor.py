"""The actor's role: student, teacher, optimizer; one call a step."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler

from sdpo.algorithm.aggregation import compute_distillation_coef, compute_token_weights
from sdpo.algorithm.batch import TokenBatch
from sdpo.algorithm.importance_sampling import compute_rollout_ratio
from sdpo.algorithm.regularization import Regularization
from sdpo.algorithm.sums import Sums, add_sums, mean_of
from sdpo.algorithm.teacher import build_teacher
from sdpo.config.root import SDPOConfig
from sdpo.errors import ConfigError
from sdpo.kernels.chunked_log_probs import LinearHead
from sdpo.kernels.cpu.allocator import is_out_of_memory
from sdpo.kernels.dispatch import fused_linear_sdpo_loss, score_tokens
from sdpo.kernels.fused_linear_loss import FusedOutputs
from sdpo.models.forward import PaddedSequences, compute_hidden
from sdpo.models.lora.adapters import copy_without_adapters
from sdpo.models.lora.teacher import build_lora_teacher
from sdpo.models.multimodal.feature_cache import ImageFeatureCache
from sdpo.models.multimodal.vision_tower import VisionAdapter
from sdpo.models.optimizer import UpdateRounding, build_optimizer, compile_on_gpus_only
from sdpo.models.output_head import build_linear_head, measure_logit_scale, suppress_tokens
from sdpo.models.packing.layout import PackedSequences
from sdpo.models.packing.support import enable_packing
from sdpo.observability import metrics
from sdpo.observability.confidence import ClusteredMean, name_interval
from sdpo.trainer.actor.collate import Collator, MicroBatch
from sdpo.trainer.data.samples import TrainingSample
from sdpo.trainer.rollout.weight_sync import copy_parameters


@dataclass(frozen=True)
class LogProbs:
    """Log-probabilities of each sample's response tokens under other policies than the student as it is."""

    old: list[Tensor] | None  # the student before the step; None: it is what it was
    ref: list[Tensor] | None  # the initial model; None: no KL loss

    def select(self, indices: Sequence[int]) -> LogProbs:
        """Those of some samples."""
        return LogProbs(*(None if many is None else [many[i] for i in indices] for many in (self.old, self.ref)))

    def pack(self) -> tuple[Tensor | None, Tensor | None]:
        """All samples' tokens in one tensor [N]."""
        old, ref = (None if many is None else torch.cat(many) for many in (self.old, self.ref))
        return old, ref


class Actor:
    """Trains the student on scored samples.

    Args:
        tell: hears of what a person should know, such as memory that was too small.

    Attributes:
        student: the model that learns.
        teacher: its teacher; None where nothing is distilled (``policy_loss_weight=1``).
        version: how many steps' updates the student has had.
        max_tokens_per_micro_batch: most tokens in a micro-batch; halved each time that memory was too small for one.
        best: what is trained of the student, at its best evaluation so far, if it is to go back there once a live
            teacher is frozen.
        initial: the initial model, if something is compared with it or it may become the teacher.
        distillation_factor: what the scheduled weight of the distillation loss is multiplied by; alarms lower it.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        run: SDPOConfig,
        pad_token_id: int,
        vision: VisionAdapter | None = None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.run = run
        self.config = run.self_distillation
        self.student = student
        self.device = student.device
        self.vision = vision
        self.tell = tell
        self.version = 0
        self.max_tokens_per_micro_batch = run.actor.max_tokens_per_micro_batch
        self.regularization = _build_regularization(run)
        self.distillation_factor = 1.0
        self.best: dict[str, Tensor] | None = None
        self._check_topk()
        self.logit_scale = measure_logit_scale(student)
        self.batcher = Collator(pad_token_id, self.device, vision, enable_packing(student, vision))
        if run.actor.gradient_checkpointing:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        build = build_lora_teacher if run.lora.rank else build_teacher
        self.teacher = build(student, self.config) if self.config.distills else None
        self.initial = self._keep_initial(student)
        trained = [param for param in student.parameters() if param.requires_grad]
        self.optimizer = build_optimizer(trained, run.optim)
        self.rounding = UpdateRounding(self.optimizer, tell, run.seed)
        minis = run.data.train_batch_size // (run.actor.mini_batch_size or run.data.train_batch_size)
        self.scheduler = get_scheduler(
            "constant_with_warmup" if run.optim.lr_scheduler_type == "constant" else run.optim.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=run.optim.warmup_steps,
            num_training_steps=run.max_steps * minis,
        )

    def state_dict(self) -> dict[str, Any]:
        """All that decides how learning goes on, beside the weights of the student and of the teacher's module."""
        return {
            "version": self.version,
            "max_tokens_per_micro_batch": self.max_tokens_per_micro_batch,
            "moments": self.optimizer.state_dict()["state"],
            "num_updates": self.scheduler.last_epoch,
            "teacher": self.teacher.state_dict() if self.teacher is not None else None,
            "distillation_factor": self.distillation_factor,
            "best": self.best,
        }

    def load_state_dict(self, state: Mapping[str, Any], teacher_module: torch.nn.Module | None) -> None:
        """Go on from ``state_dict``, the student being as it was then; learning rate and decay are the run's.

        Args:
            teacher_module: what the teacher's module was then, if it has one.
        """
        self.distillation_factor, self.best = state["distillation_factor"], state["best"]
        self.version = state["version"]
        self.max_tokens_per_micro_batch = min(self.max_tokens_per_micro_batch, state["max_tokens_per_micro_batch"])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state["moments"]})
        count = state["num_updates"]
        lrs = [lr * scale(count) for lr, scale in zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)]
        self.scheduler.load_state_dict(
            {**self.scheduler.state_dict(), "last_epoch": count, "_step_count": count + 1, "_last_lr": lrs}
        )
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)  # torchao's stays the tensor that it is
            else:
                group["lr"] = lr
        if self.teacher is not None:
            if state["teacher"]["kind"] != self.teacher.kind:
                self.teacher.freeze(self.initial)
            self.teacher.load_state_dict(state["teacher"])
            if self.teacher.module is not None and teacher_module is not None:
                copy_parameters(dict(teacher_module.named_parameters()), self.teacher.module)

    def update_policy(
        self, samples: Sequence[TrainingSample], before_update: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """One step: every sample once, an optimizer step a mini-batch, then the teacher follows.

        Args:
            samples: ``n`` consecutive ones a prompt; those that were not scored are left out.
            before_update: called before weights change; from then until it returns they are of no step.

        Returns:
            The step's metrics.
        """
        step = self.version + 1
        mini_size = (self.run.actor.mini_batch_size or self.run.data.train_batch_size) * self.run.rollout.n
        minis = [
            [j for j in range(i, min(i + mini_size, len(samples))) if samples[j].is_scored]
            for i in range(0, len(samples), mini_size)
        ]
        images = self._step_images()
        # With a single optimizer step the student still is the old policy, and its own forward pass tells.
        old_log_probs = self.compute_log_probs(samples, images) if len(minis) > 1 else None
        initial = None
        if self.run.actor.kl_loss_coef or self._measures_kl(step):
            initial = self.compute_log_probs(samples, images, self.initial)
        kl = {}
        if initial is not None and self._measures_kl(step):
            kl = _estimate_kl_to_initial(samples, old_log_probs or self.compute_log_probs(samples, images), initial)
        log_probs = LogProbs(old_log_probs, initial if self.run.actor.kl_loss_coef else None)
        coef = compute_distillation_coef(self.config, step, self.run.max_steps) * self.distillation_factor
        results = [
            self._learn_mini_batch(
                [samples[i] for i in mini],
                log_probs.select(mini),
                coef,
                images,
                before_update,
            )
            for mini in minis
        ]
        self.optimizer.zero_grad(set_to_none=True)  # sampling has their memory
        if self.teacher is not None:
            self.teacher.step(self.student)
        self.version = step
        values = _average(results) | kl
        if self.config.distills:
            values[metrics.DISTILLATION_COEF] = coef
        if self.run.actor.kl_loss_coef:
            values[metrics.KL_COEF] = self.run.actor.kl_loss_coef
        return values

    @property
    def teacher_is_frozen(self) -> bool:
        """Whether ``freeze_teacher`` has been called."""
        return self.teacher is not None and self.teacher.kind != self.config.teacher_regularization

    def reduce_distillation(self) -> None:
        """Make the weight of the distillation loss ``health.reduce_factor`` times what it is, not below the floor."""
        self.distillation_factor = self.run.health.reduce(self.distillation_factor)

    def snapshot_best(self) -> None:
        """Remember the student as it is, where the live teacher may be frozen once the student is no longer well."""
        if self.run.health.may_freeze and self.teacher is not None and self.teacher.module is None:
            self.best = {name: param.detach().clone() for name, param in self._trained()}

    def freeze_teacher(self) -> None:
        """From now on the teacher stays as it is.

        The live one becomes the initial model: as a teacher, the student of a while ago may be spoilt already. And that
        one's student goes back to its best evaluation, if there was one: where everything is lost, no success is left
        to learn from.
        """
        if self.teacher is None:
            return
        if self.best is not None:
            self._restore(self.best)
            self.best = None
        self.teacher.freeze(self.initial)

    @torch.no_grad()
    def compute_log_probs(
        self,
        samples: Sequence[TrainingSample],
        images: ImageFeatureCache | None = None,
        model: torch.nn.Module | None = None,
    ) -> list[Tensor]:
        """Log-probabilities of each sample's response tokens under the student as it is now, or another model.

        ``images`` has the features of the samples' images, where other passes need them too.
        """
        images = images or self._step_images()
        while True:
            try:
                return self._compute_log_probs_by_piece(samples, images, model)
            except (RuntimeError, MemoryError) as error:
                self._halve_micro_batch_on_oom(error, samples)

    def _compute_log_probs_by_piece(
        self, samples: Sequence[TrainingSample], images: ImageFeatureCache | None, model: torch.nn.Module | None
    ) -> list[Tensor]:
        result: list[Tensor] = [torch.empty(0)] * len(samples)
        for piece in self.batcher.split(samples, self.max_tokens_per_micro_batch):
            batch = self.batcher.build([samples[i] for i in piece])
            hidden = self._read_student(batch, images) if model is None else self._read(model, batch.student, images)
            log_probs = self._compute_log_probs(hidden, batch)
            for i, values in zip(
                piece, log_probs.split([len(samples[i].response.token_ids) for i in piece]), strict=True
            ):
                result[i] = values
        return result

    def _learn_mini_batch(
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
            spreads = {metrics.ENTROPY: ClusteredMean(), metrics.TEACHER_GAP: ClusteredMean()}
            try:
                sums, nonfinite = self._accumulate_gradients(samples, log_probs, coef, images, spreads)
            except (RuntimeError, MemoryError) as error:
                self._halve_micro_batch_on_oom(error, samples)
                continue
            if not nonfinite:
                break
            # A NaN that is only masked still comes back through the backward pass: begin again without its sample.
            num_dropped += len(nonfinite)
            kept = [i for i in range(len(samples)) if i not in nonfinite]
            samples = [samples[i] for i in kept]
            log_probs = log_probs.select(kept)
        values = {name: float(total) / max(int(count), 1) for name, (total, count) in sums.items()}
        for name, spread in spreads.items():
            values |= name_interval(name, spread.normal_interval())
        values |= {metrics.NONFINITE_SAMPLES: float(num_dropped), metrics.LR: float(self.scheduler.get_last_lr()[0])}
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
        """Gradients of the mini-batch's loss; stops at the first micro-batch with samples that are not finite."""
        mode, horizon = self.run.actor.loss_agg_mode, self.run.rollout.max_response_length
        lengths = torch.tensor([len(s.response.token_ids) for s in samples])
        distilled = torch.tensor([s.is_distilled for s in samples], dtype=torch.bool)
        policy_weights = compute_token_weights(lengths, mode, horizon)
        distillation_weights = compute_token_weights(lengths * distilled, mode, horizon)
        distillation_weights = distillation_weights * torch.tensor([s.distillation_weight for s in samples])
        sums: Sums = {}
        for piece in self.batcher.split(samples, self.max_tokens_per_micro_batch):
            batch = self.batcher.build([samples[i] for i in piece])
            weights = [w[piece].to(self.device)[batch.sample_index] for w in (policy_weights, distillation_weights)]
            outputs, more = self._forward(batch, log_probs.select(piece), weights[0], weights[1], coef, images)
            checked = (outputs.token_losses, outputs.student_log_probs, batch.rollout_log_probs)
            broken = ~torch.stack([torch.isfinite(values) for values in checked]).all(0)
            if bool(broken.any()):
                return sums, {piece[i] for i in batch.sample_index[broken].unique().tolist()}
            outputs.loss.backward()
            add_sums(sums, {**outputs.sums, **more})
            prompts = [id(samples[i].prompt) for i in piece]
            _add_by_prompt(spreads[metrics.ENTROPY], outputs.student_entropies, batch.sample_index, prompts)
            if batch.teacher is not None:
                gap = outputs.teacher_log_probs - outputs.student_log_probs[batch.distilled]
                _add_by_prompt(spreads[metrics.TEACHER_GAP], gap, batch.sample_index[batch.distilled], prompts)
        if images is not None:
            images.backward()
        return sums, set()

    def _forward(
        self,
        batch: MicroBatch,
        log_probs: LogProbs,
        policy_weights: Tensor,
        distillation_weights: Tensor,
        coef: float,
        images: ImageFeatureCache | None,
    ) -> tuple[FusedOutputs, Sums]:
        student = self._read_student(batch, images)
        teacher: list[LinearHead] = []
        if batch.teacher is not None:
            assert self.teacher is not None
            with torch.no_grad():
                teacher = [
                    self._read(module, batch.teacher, images, coefficient)
                    for module, coefficient in self.teacher.policy(self.student)
                ]
        old, ref = log_probs.pack()
        correction = self.run.rollout_correction.rollout_is
        if correction == "sequence" and old is None:
            old = self._compute_log_probs(student, batch)  # all of a sequence's tokens decide the weight of each
        # Without other log-probabilities the student's own are the old policy's, known only within the loss.
        weights = self._correct(old, batch)[0] if old is not None else None
        outputs = fused_linear_sdpo_loss(
            student,
            teacher,
            TokenBatch(
                sampled_ids=batch.sampled_ids,
                old_log_probs=old,
                policy_weights=policy_weights,
                advantages=batch.advantages,
                rollout_is_weights=weights,
                rollout_log_probs=batch.rollout_log_probs if old is None and correction == "token" else None,
                rollout_is_threshold=self.run.rollout_correction.rollout_is_threshold,
                distilled=batch.distilled,
                distillation_weights=distillation_weights,
                distillation_coef=coef,
                ref_log_probs=ref,
                regularization=self.regularization,
            ),
            self.config,
            temperature=self.run.rollout.temperature,
        )
        return outputs, self._correct(outputs.student_log_probs if old is None else old, batch)[1]

    def _read_student(self, batch: MicroBatch, images: ImageFeatureCache | None) -> LinearHead:
        # Only this mode lets transformers checkpoint; everything else runs without dropout, as sampling does.
        self.student.train(self.run.actor.gradient_checkpointing and torch.is_grad_enabled())
        return self._read(self.student, batch.student, images)

    def _read(
        self,
        module: torch.nn.Module,
        sequences: PaddedSequences | PackedSequences,
        images: ImageFeatureCache | None,
        coefficient: float = 1.0,
    ) -> LinearHead:
        features = images.select(module, sequences.images) if images is not None else ()
        with self._precision():
            hidden = compute_hidden(module, sequences, vision=self.vision, features=features)
        if self.run.actor.autocast:
            hidden = hidden.bfloat16()  # as autocast has it in the output layer's product
        if self.logit_scale != 1.0:
            hidden = hidden * self.logit_scale
        logits = build_linear_head(module, hidden, coefficient)
        return logits if self.vision is None else suppress_tokens(logits, self.vision.placeholder_ids)

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, param) for name, param in self.student.named_parameters() if param.requires_grad]

    @torch.no_grad()
    def _restore(self, weights: Mapping[str, Tensor]) -> None:
        for name, param in self._trained():
            param.copy_(weights[name])

    def _keep_initial(self, student: PreTrainedModel) -> torch.nn.Module | None:
        """The initial model, if it is needed: the teacher's module where that stays the initial model anyway."""
        if not self.run.needs_initial:
            return None
        if self.run.teacher_stays_initial:
            assert self.teacher is not None
            return self.teacher.module
        initial = copy_without_adapters(student) if self.run.lora.rank else copy.deepcopy(student)
        return initial.requires_grad_(False).eval()

    def _measures_kl(self, step: int) -> bool:
        every = self.run.health.ref_kl_interval
        return every > 0 and (step == 1 or step % every == 0)

    def _compute_log_probs(self, student: LinearHead, batch: MicroBatch) -> Tensor:
        return score_tokens(student, batch.sampled_ids, temperature=self.run.rollout.temperature)[0]

    def _precision(self) -> torch.autocast:
        # A weight is needed once a pass: a cache of cast weights would only hold all of the model.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.actor.autocast, cache_enabled=False)

    def _step_images(self) -> ImageFeatureCache | None:
        if self.vision is None:
            return None
        return ImageFeatureCache(
            self.vision.reader, student=self.student, frozen=not self.run.trains_vision, precision=self._precision
        )

    def _correct(self, old: Tensor, batch: MicroBatch) -> tuple[Tensor | None, Sums]:
        """The truncated importance weight old policy / sampler of each token, and its metrics."""
        sums: Sums = {metrics.ROLLOUT_KL: mean_of(batch.rollout_log_probs - old)}
        level, threshold = self.run.rollout_correction.rollout_is, self.run.rollout_correction.rollout_is_threshold
        ratio = compute_rollout_ratio(old, batch.rollout_log_probs, batch.sample_index, level)
        if ratio is None:
            return None, sums
        weights = ratio.clamp(max=threshold)
        sums[metrics.ROLLOUT_IS_MEAN] = mean_of(weights)
        sums[metrics.ROLLOUT_IS_CLIP_FRACTION] = mean_of((ratio > threshold).to(weights.dtype))
        return weights, sums

    def _update(self) -> dict[str, float]:
        norm = float(torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.run.optim.max_grad_norm))
        finite = math.isfinite(norm)
        if finite:
            with compile_on_gpus_only(self.device.type):
                self.optimizer.step()
            self.scheduler.step()
        values = {metrics.GRAD_NORM: norm, metrics.SKIPPED_UPDATES: float(not finite)}
        lost = self.rounding.take()
        return values if lost is None else values | {metrics.UPDATE_ROUNDING: lost}

    def _halve_micro_batch_on_oom(self, error: Exception, samples: Sequence[TrainingSample]) -> None:
        """Halve the micro-batches if it was memory that was lacking.

        Raises:
            ConfigError: they are single samples already.
            Exception: the error itself, if it was another one.
        """
        if not is_out_of_memory(error):
            raise error
        self.optimizer.zero_grad(set_to_none=True)
        largest = max(map(len, self.batcher.split(samples, self.max_tokens_per_micro_batch)))
        if largest == 1:
            longest = max(_count_tokens(sample) for sample in samples)
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"actor: memory is too small for the longest sample of {longest} tokens ({reason:.200}); lower "
                "data.max_prompt_length or rollout.max_response_length, or set actor.gradient_checkpointing=true"
            ) from error
        while max(map(len, self.batcher.split(samples, self.max_tokens_per_micro_batch))) == largest:
            self.max_tokens_per_micro_batch //= 2
        self.tell(
            "out of memory in a micro-batch; continuing with actor.max_tokens_per_micro_batch="
            f"{self.max_tokens_per_micro_batch}"
        )

    def _check_topk(self) -> None:
        topk, vocab_size = self.config.distillation_topk, self.student.config.get_text_config().vocab_size
        if topk is not None and topk > vocab_size:
            raise ConfigError(
                f"self_distillation.distillation_topk={topk} is more than the model's vocabulary of {vocab_size}; "
                "lower it or remove it"
            )


def _build_regularization(run: SDPOConfig) -> Regularization:
    settings = run.actor
    return Regularization(settings.kl_loss_coef or None, settings.kl_loss_type, settings.entropy_coeff)


def _estimate_kl_to_initial(
    samples: Sequence[TrainingSample], student: Sequence[Tensor], initial: Sequence[Tensor]
) -> dict[str, float]:
    """KL(student || initial model) by token, on the tokens that the student drew: unbiased, of either sign."""
    kl = ClusteredMean()
    for sample, ours, theirs in zip(samples, student, initial, strict=True):
        kl.add(id(sample.prompt), float((ours - theirs).sum()), len(ours))
    return {metrics.REF_KL: kl.mean} | name_interval(metrics.REF_KL, kl.normal_interval())


def _count_tokens(sample: TrainingSample) -> int:
    """What student and teacher read of it."""
    response = len(sample.response.token_ids)
    teacher = len(sample.teacher_prompt.token_ids) + response if sample.teacher_prompt.token_ids is not None else 0
    return len(sample.prompt.token_ids) + response + teacher


def _average(results: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean over mini-batches; counters add up, and the learning rate is the last one."""
    collected: dict[str, list[float]] = defaultdict(list)
    for result in results:
        for name, value in result.items():
            collected[name].append(value)
    values = {name: sum(many) / len(many) for name, many in collected.items()}
    for name in (metrics.NONFINITE_SAMPLES, metrics.SKIPPED_UPDATES):
        values[name] = sum(collected[name])
    return values | {metrics.LR: results[-1][metrics.LR]}


def _add_by_prompt(mean: ClusteredMean, values: Tensor, sample_index: Tensor, prompts: Sequence[int]) -> None:
    """Add values [N] of tokens, each in the cluster of its sample's prompt."""
    totals = values.new_zeros(len(prompts)).index_add_(0, sample_index, values)
    counts = values.new_zeros(len(prompts)).index_add_(0, sample_index, torch.ones_like(values))
    for prompt, total, count in zip(prompts, totals.tolist(), counts.tolist(), strict=True):
        mean.add(prompt, total, count)
