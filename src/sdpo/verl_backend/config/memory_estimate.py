"""What a run on verl would cost: student, teacher and moments in shards over the GPUs that train, the rest on each.

With LoRA the teacher is the student's weights and float32 deltas of the adapted layers; adapters alone have gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from sdpo.algorithm.teacher import follows
from sdpo.config.root import SDPOConfig
from sdpo.models.memory_estimate import (
    BYTES,
    Lengths,
    MemoryEstimate,
    ModelSize,
    bound_lengths,
    count_fused_loss,
    count_log_probs,
    count_moments,
    count_update,
    measure_model,
)

# Settings of verl that say how many GPUs there are, with the defaults of config/sdpo_trainer.yaml.
GPUS = {
    "trainer.nnodes": 1,
    "trainer.n_gpus_per_node": 1,
    "rollout.nnodes": 1,
    "rollout.n_gpus_per_node": 1,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
}
# rollout.checkpoint_engine.update_weights_bucket_megabytes
BUCKET = 2048 * 2**20
UTILIZATION = "actor_rollout_ref.rollout.gpu_memory_utilization"
SHARED_UTILIZATION = 0.5  # of config/sdpo_sync.yaml
GPU_OF_80_GB = int(79.6 * 2**30)


def estimate_memory(run: SDPOConfig, overrides: Sequence[str]) -> MemoryEstimate:
    """Tokens a step, and memory of a GPU that trains and of one that samples.

    Nothing is taken for offloaded: verl moves what ``param_offload`` and ``optimizer_offload`` name back before a batch
    is learned. With ``offload_policy=true`` a GPU needs less than is said here.

    Args:
        run: with ``output_dir`` and so on; its ``verl`` is among the overrides.
        overrides: as verl gets them (``build_command``); the number of GPUs is read from them.
    """
    gpus = read_gpus(overrides)
    actors = gpus["trainer.nnodes"] * gpus["trainer.n_gpus_per_node"]
    samplers = gpus["rollout.nnodes"] * gpus["rollout.n_gpus_per_node"] if run.max_staleness else actors
    parallel = gpus["actor_rollout_ref.rollout.tensor_model_parallel_size"]
    model = measure_model(run.model, run.lora)
    lengths = bound_lengths(run, model.window)
    sequences = run.data.train_batch_size * run.rollout.n
    return MemoryEstimate(
        tokens_a_step=sequences * (run.data.max_prompt_length + run.rollout.max_response_length),
        num_params=model.num_params,
        num_tower_params=model.tower.num_params if model.tower else 0,
        actor=_hold(run, model, actors),
        learning=_hold_learning(run, model, actors),
        phases={
            "a micro-batch": _learn(run, model, lengths),
            "old log-probabilities": _score(run, model, lengths),
            "the update": {
                "copies of the weights": _share(count_update(run, model, _count_averaged(run, model)), actors)
            },
        },
        sampler=_sample(run, model, lengths, samplers // parallel or 1, parallel)
        if run.max_staleness
        else _take_turns(read_utilization(overrides)),
        colocated=not run.max_staleness,
        num_learners=actors,
        num_samplers=samplers,
    )


def read_gpus(overrides: Sequence[str]) -> dict[str, int]:
    """``GPUS`` as the overrides have them, the last of each; what is not a number is verl's to refuse."""
    found = dict(GPUS)
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key in found and value.isdigit():
            found[key] = max(int(value), 1)
    return found


def read_utilization(overrides: Sequence[str]) -> float:
    """vLLM's share of a GPU that it has in turns, as the overrides have it."""
    found = SHARED_UTILIZATION
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        with contextlib.suppress(ValueError):  # verl refuses what is not a number
            found = float(value) if key == UTILIZATION else found
    return found


def _share(size: int, num_gpus: int) -> int:
    return -(-size // num_gpus)


def _sizes(run: SDPOConfig) -> tuple[int, int]:
    """Bytes of a value in weights, and in what FSDP2 gathers of them."""
    size = BYTES[run.model.dtype]
    return size, 2 if run.actor.autocast else size


def _has_module(run: SDPOConfig) -> bool:
    """Whether the teacher is a model of its own."""
    config = run.self_distillation
    return config.distills and config.teacher_regularization != "live" and run.lora.rank == 0


def _averages(run: SDPOConfig) -> bool:
    return run.self_distillation.distills and run.self_distillation.teacher_regularization == "ema"


def _count_averaged(run: SDPOConfig, model: ModelSize) -> int:
    """Entries that are made of the student for the teacher to follow: casts, or with LoRA all of the deltas."""
    if model.adapters is not None:
        follow = run.self_distillation.distills and follows(run.self_distillation)
        return model.adapters.num_adapted if follow else 0
    return model.num_params if _averages(run) and run.model.dtype != "float32" else 0


def _count_trained(run: SDPOConfig, model: ModelSize) -> int:
    if model.adapters is not None:
        return model.adapters.num_params
    return model.language.num_params if run.actor.freeze_vision_tower else model.num_params


def _count_teacher_bytes(run: SDPOConfig, model: ModelSize) -> int:
    if model.adapters is not None:
        return 4 * _count_averaged(run, model)
    return model.num_params * (4 if _averages(run) else BYTES[run.model.dtype]) * _has_module(run)


def _hold(run: SDPOConfig, model: ModelSize, num_gpus: int) -> dict[str, int]:
    size, _ = _sizes(run)
    adapters = model.adapters.num_params if model.adapters is not None else 0
    return {
        "student": _share(model.num_params * size + adapters * 4, num_gpus),
        "AdamW's moments": _share(count_moments(run, _count_trained(run, model)), num_gpus),
        "teacher": _share(_count_teacher_bytes(run, model), num_gpus),
        # Of NCCL's: one is filled while another is on its way, and cupy's pool keeps both.
        "buffers for the sampler's weights": 2 * BUCKET if run.max_staleness else 0,
    }


def _hold_learning(run: SDPOConfig, model: ModelSize, num_gpus: int) -> dict[str, int]:
    size, gathered = _sizes(run)
    layer = max(stack.num_params // stack.num_layers for stack in (model.language, model.tower) if stack is not None)
    # What is outside the layers stays gathered from forward to backward pass; of layers, one and the next. Their
    # gradients are gathered too, and cast to float32 before the ranks add them up.
    weights = (model.outside_layers * (1 + _has_module(run)) + 2 * layer) * gathered
    learned = model.outside_layers + 2 * layer
    if model.adapters is not None:
        size, learned = 4, 2 * (model.adapters.num_params // model.language.num_layers)
    return {
        "gradients": _share(_count_trained(run, model) * size, num_gpus),
        "gathered weights and gradients": weights + learned * (gathered + 4),
    }


def _learn(run: SDPOConfig, model: ModelSize, lengths: Lengths) -> dict[str, int]:
    """Any token may be an image's, whose patches go through the tower in the same pass."""
    _, size = _sizes(run)
    checkpointing = run.actor.gradient_checkpointing
    stack, image_token = model.language, 0
    if model.tower is not None:
        learning = model.tower.count_learning(size, size, checkpointing=checkpointing)
        image_token = model.patches_a_token * (learning if model.adapters is None else model.tower.count_reading(size))
    hidden_size, head = stack.hidden_size, model.vocab_size * stack.hidden_size * size
    trains_head = model.adapters is None
    loss = count_fused_loss(model.vocab_size, hidden_size, size, lengths.scored, trains_head=trains_head)
    return {
        "activations": lengths.student * stack.count_learning(size, size, checkpointing=checkpointing)
        + lengths.teacher * stack.count_reading(size),
        "activations of the vision tower": lengths.student * image_token,
        # The teacher's output layer outlasts the teacher's pass.
        "logits": loss + head * _has_module(run) + lengths.teacher * hidden_size * size,
    }


def _score(run: SDPOConfig, model: ModelSize, lengths: Lengths) -> dict[str, int]:
    _, size = _sizes(run)
    tokens = max(run.actor.max_tokens_per_micro_batch, lengths.prompt + lengths.response)
    return {
        "activations": tokens * model.language.count_reading(size),
        "logits": count_log_probs(),
    }


def _sample(run: SDPOConfig, model: ModelSize, lengths: Lengths, replicas: int, parallel: int) -> dict[str, int]:
    """vLLM's weights are bfloat16; its cache takes what ``gpu_memory_utilization`` leaves and uses this of it."""
    size = 2
    sequences = min(run.rollout.max_num_seqs, _share(run.data.train_batch_size * run.rollout.n, replicas))
    cache = sequences * (lengths.prompt + lengths.response) * model.cache_values * size
    return {
        "weights": _share(model.num_params * size, parallel),
        "key-value cache": _share(cache, parallel),
        # Two buckets of NCCL's, and one between its process and vLLM's.
        "weights on their way": 3 * BUCKET,
    }


def _take_turns(utilization: float) -> dict[str, int]:
    """On the actor's GPU: vLLM takes its share whatever is needed, and gives it back while the actor learns."""
    return {
        "vLLM's share of a GPU of 80 GB": int(utilization * GPU_OF_80_GB),
        "weights on their way": BUCKET,
    }
