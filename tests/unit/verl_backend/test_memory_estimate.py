"""Memory of a run on verl against sizes computed by hand for Qwen2.5-VL-3B."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdpo.config.root import SDPOConfig
from sdpo.verl_backend.config.memory_estimate import BUCKET, GPU_OF_80_GB, MemoryEstimator, read_gpus, read_utilization
from sdpo.verl_backend.config.to_verl import to_verl_overrides

GOLDEN = Path(__file__).parents[2] / "golden" / "qwen2_5_vl_3b"
PARAMS, TOWER = 3_754_622_976, 668_684_288
OUTSIDE = 349_380_864  # embeddings, last norm, patches, projector
GIB = 2**30


@pytest.fixture
def estimate(make_run: Callable[..., SDPOConfig]) -> Callable[..., Any]:
    def estimate(*overrides: str, **settings: Any) -> Any:
        config = make_run(**{"model__path": str(GOLDEN), "max_staleness": 1, "optim__betas": [0.9, 0.95], **settings})
        return MemoryEstimator(config, [*to_verl_overrides(config).overrides, *overrides]).estimate()

    return estimate


def test_last_override_of_the_number_of_gpus_applies() -> None:
    assert read_gpus([]) == {
        "trainer.nnodes": 1,
        "trainer.n_gpus_per_node": 1,
        "rollout.nnodes": 1,
        "rollout.n_gpus_per_node": 1,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
    }
    found = read_gpus(
        ["trainer.nnodes=2", "+x.trainer.nnodes=9", "trainer.nnodes=3", "rollout.n_gpus_per_node=${oc.env:N}"]
    )
    assert (found["trainer.nnodes"], found["rollout.n_gpus_per_node"]) == (3, 1)


@pytest.mark.parametrize(
    ("dtype", "teacher", "student_size", "teacher_size"),
    [("float32", "ema", 4, 4), ("bfloat16", "ema", 2, 4), ("bfloat16", "frozen", 2, 2), ("float32", "live", 4, 0)],
)
def test_weights_gradients_and_moments_are_sharded(
    estimate: Callable[..., Any], dtype: str, teacher: str, student_size: int, teacher_size: int
) -> None:
    cost = estimate(
        "trainer.nnodes=2",
        "trainer.n_gpus_per_node=4",
        model__dtype=dtype,
        self_distillation__teacher_regularization=teacher,
    )
    assert (cost.num_params, cost.num_vision_params, cost.num_actor_gpus) == (PARAMS, TOWER, 8)
    share = PARAMS // 8
    assert cost.persistent["student"] == cost.training["gradients"] == share * student_size
    assert cost.persistent["AdamW's moments"] == 2 * share * student_size
    assert cost.persistent["teacher"] == share * teacher_size


@pytest.mark.parametrize(("teacher", "size"), [("ema", 4), ("snapshot", 4), ("frozen", 0), ("live", 0)])
def test_lora_memory_matches_hand_computed_sizes(estimate: Callable[..., Any], teacher: str, size: int) -> None:
    """36 layers of hidden size 2048, two key-value heads of size 128, intermediate size 11008, rank 8."""
    adapted = 36 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 11_008)
    adapters = 36 * 8 * (2 * (2048 + 2048) + 2 * (2048 + 256) + 3 * (2048 + 11_008))
    settings = {"model__dtype": "bfloat16", "self_distillation__teacher_regularization": teacher}
    cost = estimate("trainer.n_gpus_per_node=4", lora__rank=8, **settings)
    assert cost.persistent["student"] == (PARAMS * 2 + adapters * 4) // 4
    assert cost.training["gradients"] == adapters // 4 * 4
    assert cost.persistent["AdamW's moments"] == 2 * adapters // 4 * 4
    assert cost.persistent["teacher"] == adapted // 4 * size
    layer = (PARAMS - TOWER) // 36
    assert cost.training["gathered weights and gradients"] == (OUTSIDE + 2 * layer) * 2 + 2 * (adapters // 36) * 6
    one = estimate(lora__rank=8, **settings)
    # 2^26 entries of deltas, the next delta, and its product before scaling.
    deltas = (2**26 + 2 * 2048 * 11_008) * size
    assert one.phases["optimizer step"] == {"temporary tensors": max(2 * adapters * 4, deltas)}
    whole = estimate(**settings)
    head = 151_936 * 2048
    saved = whole.phases["micro-batch"]["logits"] - one.phases["micro-batch"]["logits"]
    assert saved == head * (4 + 2 + 2 * (teacher != "live"))


def test_gathered_weights_do_not_depend_on_the_number_of_gpus(estimate: Callable[..., Any]) -> None:
    one, eight = (
        estimate(f"trainer.n_gpus_per_node={n}", model__dtype="float32", actor__autocast=True) for n in (1, 8)
    )
    name = "gathered weights and gradients"
    # The largest layer is in the language model, embeddings included. Weights are bfloat16; gradients also float32.
    layer = (PARAMS - TOWER) // 36
    assert one.training[name] == (2 * OUTSIDE + 2 * layer) * 2 + (OUTSIDE + 2 * layer) * 6
    assert one.training[name] == eight.training[name]
    assert one.phases["micro-batch"] == eight.phases["micro-batch"]


def test_optimizer_step_allocates_twice_the_largest_parameter(estimate: Callable[..., Any]) -> None:
    embeddings = 151_936 * 2048
    assert estimate().phases["optimizer step"] == {"temporary tensors": 2 * 4 * embeddings}
    shards = estimate("trainer.n_gpus_per_node=8").phases["optimizer step"]
    assert shards == {"temporary tensors": embeddings}


def test_weight_sync_buffers_are_counted_on_actor_and_sampler(estimate: Callable[..., Any]) -> None:
    cost = estimate()
    assert BUCKET == 2 * GIB
    assert cost.persistent["weight sync buffers"] == 2 * BUCKET, "cupy's pool keeps them"
    assert cost.sampler["weight sync buffers"] == 3 * BUCKET, "NCCL's two, and one to vLLM's process"


def test_frozen_vision_tower_has_no_gradients_and_no_moments(estimate: Callable[..., Any]) -> None:
    cost = estimate(actor__freeze_vision_tower=True)
    assert cost.persistent["student"] == cost.persistent["teacher"] == 4 * PARAMS
    assert cost.training["gradients"] == 4 * (PARAMS - TOWER)
    assert cost.persistent["AdamW's moments"] == 8 * (PARAMS - TOWER)


def test_8_bit_moments_have_a_scale_per_256_entries(estimate: Callable[..., Any]) -> None:
    cost = estimate(optim__name="adamw_8bit")
    assert cost.persistent["AdamW's moments"] == 2 * (PARAMS + 4 * (PARAMS // 256))


def test_gpus_divide_sequences_and_tensor_parallelism_divides_heads(estimate: Callable[..., Any]) -> None:
    settings: dict[str, Any] = {"data__train_batch_size": 32, "rollout__n": 8, "data__max_prompt_length": 24}
    cost = estimate("rollout.n_gpus_per_node=4", **settings)
    assert cost.sampler["weights"] == PARAMS * 2
    assert cost.sampler["key-value cache"] == 64 * 32 * 36_864
    assert not cost.colocated and cost.num_sampler_gpus == 4
    parallel = estimate(
        "rollout.n_gpus_per_node=4", "actor_rollout_ref.rollout.tensor_model_parallel_size=2", **settings
    )
    assert parallel.sampler["weights"] == PARAMS
    assert parallel.sampler["key-value cache"] == 128 * 32 * 36_864 // 2


def test_colocated_sampler_uses_the_training_gpus(estimate: Callable[..., Any]) -> None:
    cost = estimate("trainer.n_gpus_per_node=4", max_staleness=0)
    assert cost.colocated and cost.num_sampler_gpus == 4
    assert cost.sampler == {"vLLM's fraction of an 80 GB GPU": int(0.5 * GPU_OF_80_GB), "weight sync buffers": BUCKET}
    assert "weight sync buffers" not in {name for name, size in cost.persistent.items() if size}
    one = estimate("actor_rollout_ref.rollout.gpu_memory_utilization=0.25", max_staleness=0)
    assert one.actor_peak == max(
        sum(one.persistent.values()) + GPU_OF_80_GB // 4 + BUCKET,
        sum(one.persistent.values()) + sum(one.training.values()) + max(sum(p.values()) for p in one.phases.values()),
    ), "vLLM sleeps while it learns, and gradients are gone while it samples"


def test_last_override_of_gpu_memory_utilization_applies() -> None:
    key = "actor_rollout_ref.rollout.gpu_memory_utilization"
    assert read_utilization([]) == 0.5
    assert read_utilization([f"{key}=0.7", f"++{key}=0.3", f"x.{key}=0.9", f"{key}=${{oc.env:N}}"]) == 0.3


@pytest.mark.parametrize(
    ("settings", "heads"),
    [
        ({"alpha": 0.5, "distillation_topk": 100}, 1),
        ({"alpha": 0.5}, 1),
        ({"alpha": 0.5, "teacher_regularization": "live"}, 0),
    ],
)
def test_logits_memory_consists_of_chunks_and_output_layers(
    settings: dict[str, Any], heads: int, estimate: Callable[..., Any]
) -> None:
    cost = estimate(
        model__dtype="bfloat16",
        data__train_batch_size=32,
        data__max_prompt_length=2304,
        rollout__n=8,
        rollout__max_response_length=2048,
        actor__max_tokens_per_micro_batch=6144,
        actor__gradient_checkpointing=True,
        self_distillation__max_reprompt_len=2816,
        **{f"self_distillation__{name}": value for name, value in settings.items()},
    )
    # The output layer's gradient in float32 and in bfloat16, and the teacher's output layer.
    chunks = 350_000_000 + 10 * 60_000_000 + 151_936 * 2048 * (4 + 2 + 2 * heads)
    # At most 3072 response tokens of the student and 6144 tokens of the teacher.
    assert cost.phases["micro-batch"]["logits"] == chunks + 2048 * (3072 * 4 * 2 + 6144 * 2)
    # A bound of both implementations; the CUDA kernels hold 2,048 rows of the vocabulary, 622 MB.
    assert cost.phases["old log-probabilities"]["logits"] == 280_000_000 + 10 * 60_000_000 > 2048 * 151_936 * 2


def test_vision_tower_activations_scale_with_the_token_budget(estimate: Callable[..., Any]) -> None:
    one, two = (
        estimate(data__train_batch_size=64, rollout__n=8, actor__max_tokens_per_micro_batch=n).phases["micro-batch"]
        for n in (16384, 32768)
    )
    name = "activations of the vision tower"
    assert two[name] == 2 * one[name] > 0
