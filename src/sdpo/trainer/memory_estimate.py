"""What a run on this engine would cost, from its settings and the model's architecture alone."""

from __future__ import annotations

from pathlib import Path

from sdpo.algorithm.teacher import follows
from sdpo.config.root import SDPOConfig
from sdpo.models.memory_estimate import (
    BYTES,
    Lengths,
    MemoryEstimate,
    ModelSize,
    Stack,
    bound_lengths,
    count_fused_loss,
    count_moments,
    count_update,
    measure_model,
)

# Float32 rows of the vocabulary while a token is drawn; with a nucleus they are sorted too.
DRAWING, DRAWING_FROM_NUCLEUS = 5, 12


def estimate_memory(run: SDPOConfig) -> MemoryEstimate:
    """Tokens a step, and memory of actor and sampler; no memory where the model is only made on first use."""
    tokens = run.data.train_batch_size * run.rollout.n * (run.data.max_prompt_length + run.rollout.max_response_length)
    if run.data.task_args.get("dir") and not Path(run.model.path).exists():
        return MemoryEstimate(tokens, None)
    model = measure_model(run.model, run.lora)
    lengths = bound_lengths(run, model.window)
    return MemoryEstimate(
        tokens_a_step=tokens,
        num_params=model.num_params,
        num_tower_params=model.tower.num_params if model.tower else 0,
        actor=_hold(run, model, lengths),
        learning={"gradients": _count_trained_bytes(run, model)},
        phases={
            "a micro-batch": _learn(run, model, lengths),
            "the images' gradients": _learn_tower(run, model),
            "the update": _update(run, model),
        },
        sampler=_sample(run, model, lengths),
        colocated=not run.max_staleness and run.rollout.device == run.actor.device,
    )


def _count_trained(run: SDPOConfig, model: ModelSize) -> int:
    if model.adapters is not None:
        return model.adapters.num_params
    return model.num_params if run.trains_vision else model.language.num_params


def _count_trained_bytes(run: SDPOConfig, model: ModelSize) -> int:
    return _count_trained(run, model) * (4 if model.adapters is not None else BYTES[run.model.dtype])


def _count_averaged(run: SDPOConfig, model: ModelSize) -> int:
    """Parameters that the teacher holds in float32 beside its module's weights, and makes anew of the student's."""
    config = run.self_distillation
    if not config.distills or not follows(config):
        return 0
    if model.adapters is not None:
        return model.adapters.num_adapted
    return model.num_params if config.teacher_regularization == "ema" and run.model.dtype != "float32" else 0


def _hold(run: SDPOConfig, model: ModelSize, lengths: Lengths) -> dict[str, int]:
    config, size = run.self_distillation, BYTES[run.model.dtype]
    trained = _count_trained_bytes(run, model)
    has_module = config.distills and config.teacher_regularization != "live"
    teacher = model.num_params if model.adapters is None else model.adapters.num_adapted * follows(config)
    has_initial = run.needs_initial and not run.teacher_stays_initial and model.adapters is None
    # The student's features of all of a step's images, their gradient, and the other towers'.
    copies = 2 + has_module + has_initial if run.trains_vision else 1
    image_tokens = run.data.train_batch_size * lengths.prompt if model.tower else 0
    return {
        "student": model.num_params * size + (trained if model.adapters is not None else 0),
        "AdamW's moments": count_moments(run, _count_trained(run, model)),
        "teacher": teacher * size * has_module,
        "teacher's float32 average": _count_averaged(run, model) * 4,
        "initial model": model.num_params * size * has_initial,
        "features of a step's images": image_tokens * model.feature_values * size * copies,
    }


def _learn(run: SDPOConfig, model: ModelSize, lengths: Lengths) -> dict[str, int]:
    residual = BYTES[run.model.dtype]
    size = 2 if run.actor.autocast else residual
    stack = model.language
    student = stack.count_learning(size, residual, checkpointing=run.actor.gradient_checkpointing)
    if model.adapters is not None:  # their inputs are cast to float32
        student += model.adapters.kept * 4 // (stack.num_layers if run.actor.gradient_checkpointing else 1)
    # Output layers in the data type of the products: the student's and the teacher's.
    heads = 0 if size == residual else (1 + (lengths.teacher > 0)) * model.vocab_size * stack.hidden_size * size
    mask = (lengths.prompt + lengths.response) * (1 + size)  # of one row of attention
    return {
        "activations": lengths.student * (student + mask) + lengths.teacher * stack.count_reading(size),
        "logits": count_fused_loss(
            model.vocab_size, stack.hidden_size, size, lengths.scored, trains_head=model.adapters is None
        )
        + lengths.teacher * stack.hidden_size * size
        + heads,
        "weights in bfloat16": _count_casts(run, stack) if run.actor.autocast else 0,
    }


def _count_casts(run: SDPOConfig, stack: Stack) -> int:
    """Autocast keeps its copies of the student's weights for the backward pass, of one layer if that runs it again."""
    casts = stack.num_params * 2
    return casts // stack.num_layers if run.actor.gradient_checkpointing else casts


def _learn_tower(run: SDPOConfig, model: ModelSize) -> dict[str, int]:
    """Of a frozen tower it is a forward pass alone, which takes less."""
    residual = BYTES[run.model.dtype]
    size = 2 if run.actor.autocast else residual
    checkpointing = run.actor.gradient_checkpointing
    return {
        "activations of the vision tower": model.count_tower(
            run.data.max_pixels, size, residual, checkpointing=checkpointing
        )
    }


def _update(run: SDPOConfig, model: ModelSize) -> dict[str, int]:
    return {"copies of the weights": count_update(run, model, _count_averaged(run, model))}


def _sample(run: SDPOConfig, model: ModelSize, lengths: Lengths) -> dict[str, int]:
    """Rollouts of a step, or held-out prompts, whose teacher's prompts are the longest that are decoded."""
    own_weights = run.rollout.engine == "vllm" or run.max_staleness or run.rollout.device != run.actor.device
    own_weights = own_weights or run.sampling_dtype != run.model.dtype  # a copy, for as long as they sample
    size, rows = BYTES[run.sampling_dtype], max(run.rollout.max_num_seqs, run.rollout.n)
    training = min(rows, run.data.train_batch_size * run.rollout.n)
    held_out = rows if run.eval.max_prompts is None else min(rows, run.eval.max_prompts * max(run.eval.n, 1))
    shown = max(lengths.prompt, lengths.teacher_prompt) if run.eval.evaluate_teacher else lengths.prompt
    cached = max(training * (lengths.prompt + lengths.response), held_out * (shown + lengths.response))
    prompts = max(training // run.rollout.n, 1)
    read = max(prompts * lengths.prompt, held_out * shown)
    pictured = max(prompts, held_out) * lengths.prompt * model.feature_values * size if model.tower else 0
    drawing = DRAWING if run.rollout.top_p == run.eval.top_p == 1.0 else DRAWING_FROM_NUCLEUS
    if run.rollout.engine == "vllm":
        return {"weights": model.num_params * size, "key-value cache": int(run.rollout.kv_cache_memory_gib * 2**30)}
    return {
        "weights": model.num_params * size if own_weights else 0,
        "key-value cache": cached * model.cache_values * size,
        "features of the prompts' images": pictured,
        "reading prompts": read * model.language.count_reading(size),
        "drawing tokens": max(training, held_out) * model.vocab_size * 4 * drawing,
    }
