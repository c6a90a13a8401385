"""Memory estimates of the dry run compared with the allocations of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdpo.config.root import SDPOConfig
from sdpo.kernels import chunked_log_probs
from sdpo.models.generation.sampling import SamplingParams, sample_responses
from sdpo.models.lora.adapters import add_adapters
from sdpo.models.lora.teacher import build_lora_teacher
from sdpo.models.memory_estimate import MemoryEstimate
from sdpo.models.multimodal.processor import TokenPrompt
from sdpo.report.dry_run import list_memory
from sdpo.trainer.actor.build import build_actor
from sdpo.trainer.memory_estimate import MemoryEstimator

GOLDEN = Path(__file__).parents[2] / "golden" / "qwen2_5_vl_3b"
CountPeak = Callable[[Callable[[], Any]], int]

MakeRun = Callable[..., SDPOConfig]


def test_estimate_of_weights_and_moments_matches_the_allocations(
    make_model: Callable[..., Any], make_run: MakeRun, make_samples: Any, tmp_path: Path
) -> None:
    make_model().save_pretrained(tmp_path / "model")
    config = make_run(data__max_prompt_length=24)
    estimate = MemoryEstimator(config).estimate()
    largest = max(p.numel() for p in make_model().parameters())
    assert estimate.phases["optimizer step"]["temporary tensors"] == 2 * 4 * largest
    actor = build_actor(make_model(), config, 0)
    actor.update_policy(make_samples())
    size = sum(p.numel() * p.element_size() for p in actor.student.parameters())
    moments = sum(
        state[name].numel() * 4 for state in actor.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
    )
    assert estimate.num_params == sum(p.numel() for p in actor.student.parameters())
    assert estimate.persistent["student"] == estimate.persistent["teacher"] == estimate.training["gradients"] == size
    assert estimate.persistent["AdamW's moments"] == moments
    assert estimate.tokens_per_step == 2 * 3 * (24 + 8)
    assert estimate.sampler["weights"] == 0, "the sampler uses the student's weights"


@pytest.mark.parametrize(
    ("settings", "role", "item", "factor"),
    [
        ({"max_staleness": 1}, "sampler", "weights", 1),
        ({"self_distillation__teacher_regularization": "live"}, "persistent", "teacher", 0),
        ({"self_distillation__policy_loss_weight": 1.0}, "persistent", "teacher", 0),
        ({"model__dtype": "bfloat16", "optim__betas": [0.9, 0.95]}, "persistent", "student", 0.5),
        ({"model__dtype": "bfloat16", "optim__betas": [0.9, 0.95]}, "persistent", "teacher's float32 average", 1),
        ({"actor__autocast": True}, "sampler", "weights", 0.5),
        ({"actor__kl_loss_coef": 0.1}, "persistent", "reference model", 1),
        ({"health__ref_kl_interval": 5}, "persistent", "reference model", 1),
        (
            {"actor__kl_loss_coef": 0.1, "self_distillation__teacher_regularization": "frozen"},
            "persistent",
            "reference model",
            0,
        ),
        ({"actor__kl_loss_coef": 0.1, "lora__rank": 2}, "persistent", "reference model", 0),
        ({"optim__name": "adamw_8bit"}, "persistent", "AdamW's moments", 0.5 * (1 + 4 / 256)),
    ],
)
def test_effect_of_settings_on_the_estimate(
    make_model: Callable[..., Any],
    make_run: MakeRun,
    tmp_path: Path,
    settings: dict[str, Any],
    role: str,
    item: str,
    factor: float,
) -> None:
    make_model().save_pretrained(tmp_path / "model")
    estimate = MemoryEstimator(make_run(**settings)).estimate()
    assert estimate.num_params is not None
    assert getattr(estimate, role)[item] == pytest.approx(factor * 4 * estimate.num_params, rel=1e-3)


@pytest.mark.parametrize(
    ("batch_size", "evaluation", "cached"),
    [
        (100, {"max_prompts": 2}, 6 * 32),  # 2 prompts, 3 rollouts each
        (4, {"max_prompts": 2}, 4 * 32),
        (1, {"max_prompts": 2}, 3 * 32),  # at least all rollouts of a prompt
        (4, {"max_prompts": 4}, 4 * 48),  # validation prompts with the teacher's context
        (4, {"max_prompts": 2, "n": 2}, 4 * 48),
        (4, {"evaluate_teacher": False}, 4 * 32),
    ],
)
def test_estimate_of_the_kv_cache_for_parallel_sequences(
    make_model: Callable[..., Any],
    make_run: MakeRun,
    tmp_path: Path,
    batch_size: int,
    evaluation: dict[str, Any],
    cached: int,
) -> None:
    make_model().save_pretrained(tmp_path / "model")
    config = make_run(
        rollout__max_num_seqs=batch_size,
        data__max_prompt_length=24,
        self_distillation__max_reprompt_len=40,
        **{f"eval__{name}": value for name, value in evaluation.items()},
    )
    # 2 layers, 1 head of 8 values, keys and values of 4 bytes
    assert MemoryEstimator(config).estimate().sampler["key-value cache"] == cached * 2 * 8 * 2 * 4


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_tower_has_no_gradients_and_moments(make_run: MakeRun, frozen: bool) -> None:
    half = {"model__dtype": "bfloat16", "optim__betas": [0.9, 0.95]}
    estimate = MemoryEstimator(make_run(model__path=str(GOLDEN), actor__freeze_vision_tower=frozen, **half)).estimate()
    language, tower = 3_085_938_688, 668_684_288
    trained = language + tower * (not frozen)
    assert (estimate.num_params, estimate.num_vision_params) == (language + tower, tower)
    assert estimate.persistent["student"] == estimate.persistent["teacher"] == 2 * (language + tower)
    assert estimate.training["gradients"] == 2 * trained
    assert estimate.persistent["AdamW's moments"] == 4 * trained
    assert estimate.persistent["teacher's float32 average"] == 4 * (language + tower)
    # 2 prompts of 2048 image tokens, 2048 values each: the student's features, their gradient, the teacher's features
    assert estimate.persistent["image features of a step"] == 2 * 2048 * 2048 * 2 * (1 if frozen else 3)
    # AdamW's two tensors for the embeddings; a slice of the student in float32 is smaller.
    assert estimate.phases["optimizer step"] == {"temporary tensors": 2 * 2 * 151_936 * 2048} and 2**26 < 151_936 * 2048


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["ema", "snapshot", "frozen", "live"])
def test_estimate_of_adapters_matches_the_allocations(
    make_model: Callable[..., Any], make_run: MakeRun, make_samples: Any, tmp_path: Path, dtype: str, kind: str
) -> None:
    make_model().save_pretrained(tmp_path / "model")
    config = make_run(
        lora__rank=3,
        lora__target_modules=["q_proj", "up_proj"],
        model__dtype=dtype,
        self_distillation__teacher_regularization=kind,
    )
    estimate = MemoryEstimator(config).estimate()
    student = make_model(dtype=getattr(torch, dtype))
    add_adapters(student, config.lora)
    actor = build_actor(student, config, 0)
    actor.update_policy(make_samples())

    def size(tensors: Iterable[torch.Tensor]) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    assert actor.teacher is not None
    module, weights = actor.teacher.module, actor.teacher.weights
    shared = {param.data_ptr() for param in student.parameters()}
    own = [param for param in module.parameters() if param.data_ptr() not in shared] if module is not None else []
    assert estimate.persistent["student"] == size(student.parameters())
    assert estimate.training["gradients"] == size(p for p in student.parameters() if p.requires_grad) > 0
    assert all(p.grad is None for p in student.parameters()), "gradients are freed before sampling"
    moments = [state[name] for state in actor.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert estimate.persistent["AdamW's moments"] == size(moments)
    assert estimate.persistent["teacher"] == size(own)
    assert estimate.persistent["teacher's float32 average"] == (
        size(weights.values.values()) if weights is not None else 0
    )


def test_peak_is_the_maximum_over_phases() -> None:
    phases = {"a": {"x": 5, "y": 1}, "b": {"x": 7}}
    estimate = MemoryEstimate(
        1, 1, persistent={"held": 10, "more": 2}, training={"g": 1}, phases=phases, sampler={"cache": 9}
    )
    assert estimate.actor_peak == 12 + 9, "sampling has the largest peak, without gradients"
    assert replace(estimate, training={"g": 3}).actor_peak == 12 + 3 + 7
    assert replace(estimate, colocated=False).actor_peak == 12 + 1 + 7
    assert list_memory(replace(estimate, colocated=False)) == [
        ("actor: held", 10),
        ("actor: more", 2),
        ("actor, training: g", 1),
        ("actor, a: x", 5),
        ("actor, a: y", 1),
        ("actor, b: x", 7),
        ("actor, peak", 20),
        ("sampler: cache", 9),
        ("sampler, peak", 9),
    ]
    assert list_memory(estimate)[-2:] == [("sampler: cache", 9), ("actor and sampler, peak", 21)]


# ---- allocations of a step


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_the_logits_does_not_depend_on_the_token_count(
    make_model: Callable[..., Any], make_run: MakeRun, make_sample: Any, count_peak: CountPeak, dtype: str
) -> None:
    """The complete logits would take 12 and 50 MB several times, much more than the rest."""
    vocab_size, peaks = 16_384, []
    for num_samples in (6, 24):
        config = make_run(
            rollout__max_response_length=32, model__dtype=dtype, optim__betas=[0.9, 0.95], self_distillation__alpha=0.5
        )
        actor = build_actor(make_model(vocab_size=vocab_size, dtype=getattr(torch, dtype)), config, 0)
        samples = [make_sample([3, 4], range(3, 35), [3, 4, 5]) for _ in range(num_samples)]
        actor.update_policy(samples)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunked_log_probs, "BUFFER_BYTES", 32 * vocab_size * 4)  # 2 MB
            peaks.append(count_peak(lambda actor=actor, samples=samples: actor.update_policy(samples)))
    assert max(peaks) < 30e6
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize("at_once", [1, 2000, 2**26])
@pytest.mark.parametrize("kind", ["ema", "snapshot"])
def test_deltas_of_adapters_are_computed_one_at_a_time(
    make_model: Callable[..., Any],
    make_run: MakeRun,
    count_peak: CountPeak,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    at_once: int,
) -> None:
    for module in ("algorithm.ema", "models.memory_estimate"):
        monkeypatch.setattr(f"sdpo.{module}.ENTRIES_AT_ONCE", at_once)
    shape = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 64, "num_hidden_layers": 6}
    student = make_model(**shape)
    student.save_pretrained(tmp_path / "model")
    config = make_run(
        lora__rank=1,
        model__dtype="float32",
        self_distillation__teacher_regularization=kind,
        self_distillation__teacher_sync_steps=1,
    )
    bound = MemoryEstimator(config).estimate().phases["optimizer step"]["temporary tensors"]
    add_adapters(student, config.lora)
    teacher = build_lora_teacher(student, config.self_distillation)
    assert teacher.weights is not None
    together = sum(4 * value.numel() for value in teacher.weights.values.values())
    peak = count_peak(lambda: teacher.update(student))
    assert peak <= bound + 64  # scalars
    assert (peak < together / 4) == (kind == "snapshot" or at_once < 2**26)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "dtype"), [(0, "float32"), (8, "float32"), (8, "bfloat16")])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_step_stays_below_the_estimate(
    make_model: Callable[..., Any],
    make_run: MakeRun,
    make_sample: Any,
    count_peak: CountPeak,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpointing: bool,
    dtype: str,
    rank: int,
) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 256, "vocab_size": 256, "num_hidden_layers": 3}
    model = make_model(max_position_embeddings=256, dtype=getattr(torch, dtype), **shape)
    model.save_pretrained(tmp_path / "model")
    config = make_run(
        lora__rank=rank,
        model__dtype=dtype,
        data__max_prompt_length=64,
        data__train_batch_size=4,
        rollout__max_response_length=64,
        actor__max_tokens_per_micro_batch=2 * 6 * 128,
        actor__gradient_checkpointing=checkpointing,
        self_distillation__alpha=0.5,
        self_distillation__max_reprompt_len=64,
    )
    for name in ("BUFFER_BYTES", "BLOCK_BYTES"):  # an accelerator's buffers are larger than this step
        monkeypatch.setattr(chunked_log_probs, f"ACCELERATOR_{name}", 2**20)
        monkeypatch.setattr(chunked_log_probs, name, 2**20)
    estimate = MemoryEstimator(config).estimate()
    if rank:
        add_adapters(model, config.lora)
    actor = build_actor(model, config, 0)
    samples = [make_sample([5] * 64, [3 + i] * 64, [6] * 64) for i in range(12)]
    actor.update_policy(samples)
    bound = sum(estimate.phases["micro-batch"].values()) + estimate.training["gradients"]
    assert bound / (8 if rank else 6) < count_peak(lambda: actor.update_policy(samples)) <= bound


def test_model_that_is_built_on_first_use_has_no_estimate(make_run: MakeRun, tmp_path: Path) -> None:
    estimate = MemoryEstimator(
        make_run(data__task_args={"dir": str(tmp_path / "none")}, model__path=str(tmp_path / "none/m"))
    ).estimate()
    assert estimate.num_params is None and not estimate.persistent and not estimate.sampler
    assert estimate.tokens_per_step > 0


@pytest.mark.slow
@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("vocab_size", [64, 4096])  # mostly the cache; mostly token sampling
def test_sampling_stays_below_the_estimate(
    make_model: Callable[..., Any],
    make_run: MakeRun,
    count_peak: CountPeak,
    tmp_path: Path,
    vocab_size: int,
    top_p: float,
) -> None:
    model = make_model(max_position_embeddings=256, vocab_size=vocab_size, num_hidden_layers=4)
    model.save_pretrained(tmp_path / "model")
    config = make_run(
        data__max_prompt_length=64,
        data__train_batch_size=4,
        rollout__max_response_length=64,
        rollout__n=4,
        rollout__top_p=top_p,
        eval__top_p=top_p,
        eval__max_prompts=1,
    )
    bound = sum(MemoryEstimator(config).estimate().sampler.values())
    sampling_params = SamplingParams(
        n=4, max_new_tokens=64, temperature=1.0, top_p=top_p, batch_size=16, stop_token_ids=[], pad_token_id=0
    )
    prompts = [TokenPrompt([5] * 64)] * 4
    sample_responses([(model, 1.0)], prompts, sampling_params, seed=0)
    assert bound / 6 < count_peak(lambda: sample_responses([(model, 1.0)], prompts, sampling_params, seed=0)) <= bound
