"""Estimate the memory of a run of the native trainer from its settings and the model's architecture."""

from __future__ import annotations

from pathlib import Path

from sdpo.algorithm.teacher import is_updated
from sdpo.config.root import SDPOConfig
from sdpo.models.memory_estimate import (
    BYTES,
    MemoryEstimate,
    bound_lengths,
    count_averaged_params,
    count_trained_params,
    fused_loss_bytes,
    moment_bytes,
    update_bytes,
)
from sdpo.models.model_size import measure_model

# Float32 vectors of the vocabulary's size per sequence while a token is sampled; top-p also sorts them.
SAMPLING_VECTORS, TOP_P_SAMPLING_VECTORS = 5, 12


class MemoryEstimator:
    """Memory of each part of a run, in bytes by purpose.

    Args:
        config: the run; its model is measured, unless a task that makes its own model has not made it yet.

    Attributes:
        model: sizes of the model.
        lengths: maximum lengths of sequences and micro-batches.
        param_bytes: bytes of a weight, and of a value between layers.
        value_bytes: bytes of a value in matrix products.
        num_trained: parameters with gradients.
        num_averaged: entries of the teacher's float32 average.
    """

    def __init__(self, config: SDPOConfig) -> None:
        self.config = config
        self.is_measured = not config.data.task_args.get("dir") or Path(config.model.path).exists()
        if not self.is_measured:
            return
        self.model = model = measure_model(config.model, config.lora)
        self.lengths = bound_lengths(config.data, config.rollout, config.actor, config.self_distillation, model.window)
        self.param_bytes = BYTES[config.model.dtype]
        self.value_bytes = 2 if config.actor.autocast else self.param_bytes
        self.num_trained = count_trained_params(model, freeze_vision_tower=config.actor.freeze_vision_tower)
        self.num_averaged = count_averaged_params(model, config.self_distillation, config.model.dtype)

    def estimate(self) -> MemoryEstimate:
        """Bound tokens per step and the memory of actor and sampler; without a model on disk yet, tokens alone."""
        config = self.config
        num_rollouts = config.data.train_batch_size * config.rollout.n
        tokens = num_rollouts * (config.data.max_prompt_length + config.rollout.max_response_length)
        if not self.is_measured:
            return MemoryEstimate(tokens, None)
        return MemoryEstimate(
            tokens_per_step=tokens,
            num_params=self.model.num_params,
            num_vision_params=self.model.num_vision_params,
            persistent=self.persistent(),
            training={"gradients": self.trained_bytes},
            phases={
                "micro-batch": self.micro_batch(),
                "vision tower": self.vision_tower(),
                "optimizer step": self.optimizer_step(),
            },
            sampler=self.sampler(),
            colocated=not config.max_staleness and config.rollout.device == config.actor.device,
        )

    @property
    def trained_bytes(self) -> int:
        """Bytes of the trained parameters, and of their gradients; adapters are float32."""
        return self.num_trained * (4 if self.model.lora is not None else self.param_bytes)

    def persistent(self) -> dict[str, int]:
        """What the actor's device holds all the time."""
        config, model = self.config, self.model
        distillation = config.self_distillation
        has_teacher = distillation.distills and distillation.teacher_regularization != "live"
        teacher_params = model.num_params
        if model.lora is not None:
            teacher_params = model.lora.num_adapted_params * is_updated(distillation)
        has_reference = config.needs_initial and not config.teacher_stays_initial and model.lora is None
        # If the tower is trained: the student's features, their gradients, and the features of the frozen models.
        feature_copies = 2 + has_teacher + has_reference if config.trains_vision else 1
        image_tokens = config.data.train_batch_size * self.lengths.prompt if model.vision_tower else 0
        return {
            "student": model.num_params * self.param_bytes + (self.trained_bytes if model.lora is not None else 0),
            "AdamW's moments": moment_bytes(
                config.optim.name, self.num_trained, 4 if model.lora is not None else self.param_bytes
            ),
            "teacher": teacher_params * self.param_bytes * has_teacher,
            "teacher's float32 average": self.num_averaged * 4,
            "reference model": model.num_params * self.param_bytes * has_reference,
            "image features of a step": image_tokens
            * model.feature_values_per_token
            * self.param_bytes
            * feature_copies,
        }

    def micro_batch(self) -> dict[str, int]:
        """What forward and backward pass of a micro-batch add, without the vision tower."""
        model, lengths, layers = self.model, self.lengths, self.model.language_model
        checkpointing = self.config.actor.gradient_checkpointing
        student = layers.training_bytes_per_token(self.value_bytes, self.param_bytes, checkpointing=checkpointing)
        if model.lora is not None:  # adapters cast their inputs to float32
            student += model.lora.saved_values_per_token * 4 // (layers.num_layers if checkpointing else 1)
        teacher = layers.inference_bytes_per_token(self.value_bytes)
        attention_mask_row = (lengths.prompt + lengths.response) * (1 + self.value_bytes)
        # Output layers of student and teacher, cast to the data type of the products.
        num_heads = 0 if self.value_bytes == self.param_bytes else 1 + (lengths.teacher_batch > 0)
        heads = num_heads * model.vocab_size * layers.hidden_size * self.value_bytes
        teacher_hidden = lengths.teacher_batch * layers.hidden_size * self.value_bytes
        loss = fused_loss_bytes(
            model.vocab_size,
            layers.hidden_size,
            self.value_bytes,
            lengths.scored_batch,
            trains_head=model.lora is None,
        )
        return {
            "activations": lengths.student_batch * (student + attention_mask_row) + lengths.teacher_batch * teacher,
            "logits": loss + teacher_hidden + heads,
            "weights in bfloat16": self._autocast_weights(),
        }

    def _autocast_weights(self) -> int:
        """Casts that autocast keeps for the backward pass: of all layers, or of one with checkpointing."""
        if not self.config.actor.autocast:
            return 0
        layers = self.model.language_model
        casts = layers.num_params * 2
        return casts // layers.num_layers if self.config.actor.gradient_checkpointing else casts

    def vision_tower(self) -> dict[str, int]:
        """What the vision tower adds; if it is frozen, it runs forward alone and needs less."""
        activations = self.model.vision_tower_bytes(
            self.config.data.max_pixels,
            self.value_bytes,
            self.param_bytes,
            checkpointing=self.config.actor.gradient_checkpointing,
        )
        return {"activations": activations}

    def optimizer_step(self) -> dict[str, int]:
        """What the optimizer step and the teacher's update add."""
        return {"temporary tensors": update_bytes(self.model, self.num_averaged, self.param_bytes)}

    def sampler(self) -> dict[str, int]:
        """What sampling needs, for the rollouts of a step or the validation prompts.

        The longest prompts that are sampled from are reprompts, in the teacher's validation.
        """
        config, model, lengths = self.config, self.model, self.lengths
        has_copy = config.rollout.engine == "vllm" or config.max_staleness > 0
        has_copy = has_copy or config.rollout.device != config.actor.device
        has_copy = has_copy or config.sampling_dtype != config.model.dtype  # made for the time of sampling
        value_bytes = BYTES[config.sampling_dtype]
        if config.rollout.engine == "vllm":
            cache = int(config.rollout.kv_cache_memory_gib * 2**30)
            return {"weights": model.num_params * value_bytes, "key-value cache": cache}
        max_sequences = max(config.rollout.max_num_seqs, config.rollout.n)
        rollouts = min(max_sequences, config.data.train_batch_size * config.rollout.n)
        validation = max_sequences
        if config.eval.max_prompts is not None:
            validation = min(max_sequences, config.eval.max_prompts * max(config.eval.n, 1))
        validation_prompt = lengths.prompt
        if config.eval.evaluate_teacher:
            validation_prompt = max(lengths.prompt, lengths.teacher_prompt)
        cached_tokens = max(
            rollouts * (lengths.prompt + lengths.response), validation * (validation_prompt + lengths.response)
        )
        num_prompts = max(rollouts // config.rollout.n, 1)
        prefill_tokens = max(num_prompts * lengths.prompt, validation * validation_prompt)
        image_tokens = max(num_prompts, validation) * lengths.prompt if model.vision_tower else 0
        without_top_p = config.rollout.top_p == config.eval.top_p == 1.0
        vectors = SAMPLING_VECTORS if without_top_p else TOP_P_SAMPLING_VECTORS
        return {
            "weights": model.num_params * value_bytes if has_copy else 0,
            "key-value cache": cached_tokens * model.kv_values_per_token * value_bytes,
            "image features of the prompts": image_tokens * model.feature_values_per_token * value_bytes,
            "prefill activations": prefill_tokens * model.language_model.inference_bytes_per_token(value_bytes),
            "token sampling": max(rollouts, validation) * model.vocab_size * 4 * vectors,
        }
