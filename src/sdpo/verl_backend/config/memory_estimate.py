"""Estimate the memory of a run on verl from its settings and the model's architecture.

Student, teacher and moments are sharded over the GPUs that train; all else is on each GPU. With LoRA the teacher is the
student's weights and float32 deltas of the adapted layers, and adapters alone have gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from sdpo.algorithm.teacher import is_averaged
from sdpo.config.root import SDPOConfig
from sdpo.models.memory_estimate import (
    BYTES,
    MemoryEstimate,
    bound_lengths,
    count_averaged_params,
    count_trained_params,
    fused_loss_bytes,
    log_probs_bytes,
    moment_bytes,
    update_bytes,
)
from sdpo.models.model_size import LayerStack, measure_model

TENSOR_PARALLEL = "actor_rollout_ref.rollout.tensor_model_parallel_size"
# verl's settings of the number of GPUs, with the defaults of config/sdpo_trainer.yaml.
GPUS = {
    "trainer.nnodes": 1,
    "trainer.n_gpus_per_node": 1,
    "rollout.nnodes": 1,
    "rollout.n_gpus_per_node": 1,
    TENSOR_PARALLEL: 1,
}
# rollout.checkpoint_engine.update_weights_bucket_megabytes
BUCKET = 2048 * 2**20
UTILIZATION = "actor_rollout_ref.rollout.gpu_memory_utilization"
COLOCATED_UTILIZATION = 0.5  # of config/sdpo_sync.yaml
GPU_OF_80_GB = int(79.6 * 2**30)


def read_gpus(overrides: Sequence[str]) -> dict[str, int]:
    """Read the settings in ``GPUS`` from the last override of each; verl refuses values that are not numbers."""
    found = dict(GPUS)
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key in found and value.isdigit():
            found[key] = max(int(value), 1)
    return found


def read_utilization(overrides: Sequence[str]) -> float:
    """Read the fraction of a GPU that vLLM takes when it shares the GPU with the actor."""
    found = COLOCATED_UTILIZATION
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        with contextlib.suppress(ValueError):  # verl refuses values that are not numbers
            found = float(value) if key == UTILIZATION else found
    return found


class MemoryEstimator:
    """Memory of each part of a run on verl, per GPU, in bytes by purpose.

    Offloading is not subtracted: verl moves what ``param_offload`` and ``optimizer_offload`` name back to the GPU
    before it trains a batch. With ``offload_policy=true`` a GPU needs less than this estimate.

    Args:
        config: the run.
        overrides: verl's, from ``build_command``, which includes ``config.verl``; GPUs are read from them.

    Attributes:
        model: sizes of the model.
        num_gpus: GPUs over which the actor is sharded.
        lengths: maximum lengths of sequences and micro-batches.
        param_bytes: bytes of a weight.
        value_bytes: bytes of a value in matrix products, and of a weight that FSDP2 gathers.
        num_trained: parameters with gradients.
        num_averaged: entries of the teacher that are computed from the student at an update.
        has_teacher_module: whether the teacher is a second model.
    """

    def __init__(self, config: SDPOConfig, overrides: Sequence[str]) -> None:
        distillation = config.self_distillation
        self.config = config
        self.overrides = overrides
        self.gpus = read_gpus(overrides)
        self.num_gpus = self.gpus["trainer.nnodes"] * self.gpus["trainer.n_gpus_per_node"]
        self.model = model = measure_model(config.model, config.lora)
        self.lengths = bound_lengths(config.data, config.rollout, config.actor, distillation, model.window)
        self.param_bytes = BYTES[config.model.dtype]
        self.value_bytes = 2 if config.actor.autocast else self.param_bytes
        self.num_trained = count_trained_params(model, freeze_vision_tower=config.actor.freeze_vision_tower)
        self.num_averaged = count_averaged_params(model, distillation, config.model.dtype)
        self.has_teacher_module = (
            distillation.distills and distillation.teacher_regularization != "live" and model.lora is None
        )

    def estimate(self) -> MemoryEstimate:
        """Bound tokens per step, and the memory of a GPU that trains and of a GPU that samples."""
        config, gpus = self.config, self.gpus
        num_rollouts = config.data.train_batch_size * config.rollout.n
        num_sampler_gpus = self.num_gpus
        if config.max_staleness:
            num_sampler_gpus = gpus["rollout.nnodes"] * gpus["rollout.n_gpus_per_node"]
            sampler = self.sampler(num_sampler_gpus, gpus[TENSOR_PARALLEL])
        else:
            sampler = self.colocated_sampler(read_utilization(self.overrides))
        return MemoryEstimate(
            tokens_per_step=num_rollouts * (config.data.max_prompt_length + config.rollout.max_response_length),
            num_params=self.model.num_params,
            num_vision_params=self.model.num_vision_params,
            persistent=self.persistent(),
            training=self.training(),
            phases={
                "micro-batch": self.micro_batch(),
                "old log-probabilities": self.old_log_probs(),
                "optimizer step": self.optimizer_step(),
            },
            sampler=sampler,
            colocated=not config.max_staleness,
            num_actor_gpus=self.num_gpus,
            num_sampler_gpus=num_sampler_gpus,
        )

    def persistent(self) -> dict[str, int]:
        """What a GPU that trains holds all the time."""
        model, lora = self.model, self.model.lora
        adapters = lora.num_params if lora is not None else 0
        moments = moment_bytes(self.config.optim.name, self.num_trained, self.param_bytes if lora is None else 4)
        return {
            "student": self._shard(model.num_params * self.param_bytes + adapters * 4),
            "AdamW's moments": self._shard(moments),
            "teacher": self._shard(self._teacher_bytes()),
            # Two of NCCL's buckets, one being filled and one being sent; cupy's pool keeps both.
            "weight sync buffers": 2 * BUCKET if self.config.max_staleness else 0,
        }

    def _teacher_bytes(self) -> int:
        if self.model.lora is not None:
            return 4 * self.num_averaged
        value_bytes = 4 if is_averaged(self.config.self_distillation) else self.param_bytes
        return self.model.num_params * value_bytes * self.has_teacher_module

    def training(self) -> dict[str, int]:
        """What a GPU also holds while it trains.

        FSDP2 keeps parameters outside the layers gathered from forward to backward pass, and of the layers one and the
        next. Their gradients are gathered too, and cast to float32 before the ranks reduce them.
        """
        model = self.model
        stacks = [stack for stack in (model.language_model, model.vision_tower) if stack is not None]
        two_layers = 2 * max(stack.num_params // stack.num_layers for stack in stacks)
        num_gathered = model.num_params_outside_layers * (1 + self.has_teacher_module) + two_layers
        num_gradients = model.num_params_outside_layers + two_layers
        gradient_bytes = self.param_bytes
        if model.lora is not None:
            num_gradients = 2 * (model.lora.num_params // model.language_model.num_layers)
            gradient_bytes = 4
        return {
            "gradients": self._shard(self.num_trained * gradient_bytes),
            "gathered weights and gradients": num_gathered * self.value_bytes + num_gradients * (self.value_bytes + 4),
        }

    def micro_batch(self) -> dict[str, int]:
        """What forward and backward pass of a micro-batch add.

        Any token may be an image's; its patches go through the vision tower in the same pass.
        """
        model, lengths, layers = self.model, self.lengths, self.model.language_model
        student = self._training_bytes(layers)
        teacher = layers.inference_bytes_per_token(self.value_bytes)
        vision = 0
        if model.vision_tower is not None:
            per_patch = model.vision_tower.inference_bytes_per_token(self.value_bytes)
            if model.lora is None:
                per_patch = self._training_bytes(model.vision_tower)
            vision = model.patches_per_token * per_patch
        loss = fused_loss_bytes(
            model.vocab_size,
            layers.hidden_size,
            self.value_bytes,
            lengths.scored_batch,
            trains_head=model.lora is None,
        )
        # The teacher's output layer stays gathered after the teacher's pass.
        teacher_head = model.vocab_size * layers.hidden_size * self.value_bytes * self.has_teacher_module
        teacher_hidden = lengths.teacher_batch * layers.hidden_size * self.value_bytes
        return {
            "activations": lengths.student_batch * student + lengths.teacher_batch * teacher,
            "activations of the vision tower": lengths.student_batch * vision,
            "logits": loss + teacher_head + teacher_hidden,
        }

    def _training_bytes(self, stack: LayerStack) -> int:
        checkpointing = self.config.actor.gradient_checkpointing
        return stack.training_bytes_per_token(self.value_bytes, self.value_bytes, checkpointing=checkpointing)

    def old_log_probs(self) -> dict[str, int]:
        """What the forward pass of the old policy adds."""
        budget = self.config.actor.max_tokens_per_micro_batch
        tokens = max(budget, self.lengths.prompt + self.lengths.response)
        return {
            "activations": tokens * self.model.language_model.inference_bytes_per_token(self.value_bytes),
            "logits": log_probs_bytes(),
        }

    def optimizer_step(self) -> dict[str, int]:
        """What the optimizer step and the teacher's update add."""
        return {"temporary tensors": self._shard(update_bytes(self.model, self.num_averaged, self.param_bytes))}

    def sampler(self, num_gpus: int, tensor_parallel: int) -> dict[str, int]:
        """What vLLM needs on a GPU that only samples, with weights in bfloat16.

        The cache is the part that sequences use of the memory that ``gpu_memory_utilization`` reserves.
        """
        config = self.config
        num_replicas = num_gpus // tensor_parallel or 1
        num_rollouts = config.data.train_batch_size * config.rollout.n
        sequences = min(config.rollout.max_num_seqs, _divide(num_rollouts, num_replicas))
        cache = sequences * (self.lengths.prompt + self.lengths.response) * self.model.kv_values_per_token * 2
        return {
            "weights": _divide(self.model.num_params * 2, tensor_parallel),
            "key-value cache": _divide(cache, tensor_parallel),
            # Two of NCCL's buckets, and one between its process and vLLM's.
            "weight sync buffers": 3 * BUCKET,
        }

    def colocated_sampler(self, utilization: float) -> dict[str, int]:
        """What vLLM takes on the actor's GPU, whatever it needs; it frees this memory while the actor trains."""
        return {
            "vLLM's fraction of an 80 GB GPU": int(utilization * GPU_OF_80_GB),
            "weight sync buffers": BUCKET,
        }

    def _shard(self, size: int) -> int:
        return _divide(size, self.num_gpus)


def _divide(size: int, parts: int) -> int:
    """Divide, rounding up."""
    return -(-size // parts)
