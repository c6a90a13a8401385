"""The native trainer and the verl backend take the same step from the same samples, on one rank and on two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from sdpo.config.model import LoraConfig
from sdpo.config.root import SDPOConfig
from sdpo.models.lora.adapters import add_adapters
from sdpo.observability import metrics
from sdpo.prompting.demonstrations import PrivilegedContext
from sdpo.prompting.teacher_context import TeacherContext
from sdpo.prompting.tokenization import TeacherPrompt
from sdpo.rewards.toy.hidden_rule import build_tokenizer
from sdpo.trainer.actor.build import build_actor
from sdpo.trainer.data.samples import TrainingSample

PROMPTS, N = 4, 2  # two ranks of four samples each

SETTINGS: dict[str, dict[str, Any]] = {
    "forward KL": {"alpha": 0.0},
    "JSD": {"alpha": 0.5},
    "reverse KL": {"alpha": 1.0},
    "forward KL, top-k": {"alpha": 0.0, "distillation_topk": 4},
    "JSD, top-k": {"alpha": 0.5, "distillation_topk": 4},
    "reverse KL, top-k": {"alpha": 1.0, "distillation_topk": 4},
    "top-k without tail": {"alpha": 0.3, "distillation_topk": 3, "distillation_add_tail": False},
    "sampled token": {"alpha": 1.0, "full_logit_distillation": False},
    "blend with GRPO": {"alpha": 0.5, "policy_loss_weight": 0.7},
    "GRPO alone": {"policy_loss_weight": 1.0},
    "clips and entropy weight": {"alpha": 0.5, "divergence_clip": 0.5, "teacher_entropy_beta": 0.3, "is_clip": 1.05},
    "trust region": {"teacher_regularization": "trust-region", "ema_update_rate": 0.3},
    "live": {"teacher_regularization": "live", "alpha": 1.0},
    "frozen": {"teacher_regularization": "frozen"},
    "snapshot": {"teacher_regularization": "snapshot", "teacher_sync_steps": 1},
}
SNAPSHOT = {"self_distillation__teacher_sync_steps": 1}
# Settings of actor and rollout.
WAYS: dict[str, dict[str, Any]] = {
    "two mini-batches": {"actor__mini_batch_size": 2},
    "mean of sequences": {"actor__loss_agg_mode": "seq-mean-token-mean"},
    "norm by horizon": {"actor__loss_agg_mode": "seq-mean-token-sum-norm"},
    "temperature": {"rollout__temperature": 0.7},
    "no rollout weights": {"rollout_correction__rollout_is": "none"},
    # With GRPO, every token has a gradient at the first step. The gradient of the KL alone is rounding error there,
    # which AdamW turns into full steps.
    "KL to the reference model": {"actor__kl_loss_coef": 0.4, "self_distillation__policy_loss_weight": 0.3},
    "KL and entropy, mean of sequences": {
        "actor__kl_loss_coef": 0.4,
        "actor__kl_loss_type": "k1+",
        "actor__entropy_coeff": 0.05,
        "actor__loss_agg_mode": "seq-mean-token-mean",
    },
    "entropy, GRPO alone, two mini-batches": {
        "actor__entropy_coeff": 0.05,
        "actor__mini_batch_size": 2,
        "self_distillation__policy_loss_weight": 1.0,
    },
}
# LoRA with each teacher; its deltas are compared, if it has any.
ADAPTED: dict[str, dict[str, Any]] = {
    "LoRA": {"lora__alpha": 6},
    "LoRA, some layers": {"lora__target_modules": ["q_proj", "1.mlp.down_proj"], "actor__mini_batch_size": 2},
    "LoRA, snapshot": {"self_distillation__teacher_regularization": "snapshot", **SNAPSHOT},
    "LoRA, trust region": {"self_distillation__teacher_regularization": "trust-region", "self_distillation__alpha": 0},
    "LoRA, frozen": {"self_distillation__teacher_regularization": "frozen", "self_distillation__distillation_topk": 4},
    "LoRA, live": {"self_distillation__teacher_regularization": "live"},
    "LoRA, GRPO alone": {"self_distillation__policy_loss_weight": 1.0},
    "LoRA, tied weights": {"self_distillation__policy_loss_weight": 0.3},
    "LoRA, soft-capped logits": {"self_distillation__ema_update_rate": 0.3},
}
SHAPE: dict[str, Any] = {
    "vocab_size": 12,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PHI = {"partial_rotary_factor": 1.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": None, "final_logit_softcapping": 2.0}
# Models with a tied, biased, scaled or soft-capped output layer.
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "tied weights": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "soft-capped logits": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, **GEMMA)),
    "scaled logits": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=0.5)),
    "biased output layer": lambda: PhiForCausalLM(PhiConfig(**SHAPE, **PHI)),
}


@pytest.fixture(scope="module")
def samples(make_samples: Callable[..., list[TrainingSample]]) -> list[TrainingSample]:
    # On two ranks, the second has a micro-batch without a distilled sample.
    return make_samples(PROMPTS * N, seed=3, undistilled=(1, 6, 7))


@pytest.fixture(scope="module")
def build_model(make_model: Callable[..., PreTrainedModel]) -> Callable[[str], PreTrainedModel]:
    """Return a run's model by the run's name, always with the same random weights."""

    def build(name: str) -> PreTrainedModel:
        name = name.removeprefix("LoRA, ")
        if name not in MODELS:
            return make_model()
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            model = MODELS[name]().eval()
            for weight, param in model.named_parameters():
                if "norm" not in weight:
                    param.normal_(std=0.4)
        return model

    return build


@pytest.fixture(scope="module")
def model_dirs(
    build_model: Callable[[str], PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp("model") for name in ("", *MODELS)}
    for name, folder in folders.items():
        build_model(name).save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
    return folders


def all_runs() -> dict[str, dict[str, Any]]:
    runs = {
        name: {f"self_distillation__{key}": value for key, value in settings.items()}
        for name, settings in SETTINGS.items()
    }
    models = {name: {"self_distillation__policy_loss_weight": 0.3} for name in MODELS}
    adapted = {name: {"lora__rank": 4, "optim__lr": 5e-3, **settings} for name, settings in ADAPTED.items()}
    return {**runs, **WAYS, **models, **adapted}


def build_student(model: PreTrainedModel, run: SDPOConfig) -> PreTrainedModel:
    """Return the model with nonzero adapters, if the run has any."""
    if run.lora.rank:
        add_adapters(model, run.lora)
        generator = torch.Generator().manual_seed(0)
        for param in get_adapter_weights(model).values():
            param.data = 0.2 * torch.randn(param.shape, generator=generator)
    return model


def describe_lora(lora: LoraConfig) -> dict[str, Any]:
    """Return the run's LoRA settings on verl."""
    if not lora.rank:
        return {}
    return {
        "lora_rank": lora.rank,
        "lora_alpha": lora.alpha or 2 * lora.rank,
        "target_modules": lora.target_modules or "all-linear",
        "lora": {"merge": True},
    }


def get_adapter_weights(model: PreTrainedModel) -> dict[str, Any]:
    return {name: param for name, param in model.named_parameters() if "lora_" in name}


@pytest.fixture(scope="module")
def native(
    build_model: Callable[[str], PreTrainedModel],
    samples: list[TrainingSample],
    make_run_in: Callable[..., Any],
) -> dict[str, dict[str, Any]]:
    """Run two steps of each run on the native trainer, with the old log-probabilities of verl's trainer."""
    results = {}
    everything = samples
    for name, settings in all_runs().items():
        run = make_run_in(data__train_batch_size=PROMPTS, rollout__n=N, **{"optim__lr": 1e-3, **settings})
        nothing = TeacherContext(PrivilegedContext(), TeacherPrompt(None, [], truncated=False))
        samples = [s if run.self_distillation.distills else replace(s, context=nothing) for s in everything]
        student = build_student(build_model(name), run)
        initial = {name: param.detach().clone() for name, param in get_adapter_weights(student).items()}
        actor = build_actor(student, run, pad_token_id=0)
        old, values = [], []
        for _ in range(2):
            old.append(actor.compute_log_probs(samples))
            values.append(actor.update_policy(samples))
        teacher = actor.teacher
        module = teacher.module if teacher is not None and not run.lora.rank else None
        deltas = teacher.weights.values if teacher is not None and teacher.weights and run.lora.rank else {}
        results[name] = {
            "run": run,
            "samples": samples,
            "old": old,
            "metrics": values,
            "student": actor.student.state_dict(),
            "teacher": module.state_dict() if module is not None else dict(deltas),
            "adapters": initial,
        }
    return results


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def on_verl(
    request: pytest.FixtureRequest,
    train_on_verl: Callable[..., dict[str, Any]],
    pad_for_verl: Callable[..., dict[str, torch.Tensor]],
    native: dict[str, dict[str, Any]],
    model_dirs: dict[str, Path],
) -> dict[str, Any]:
    cases = {}
    # verl splits a batch by rank first and each rank's part into mini-batches second. This order of the samples gives
    # both backends the same mini-batches.
    halves = [[0, 1, 4, 5], [2, 3, 6, 7]] if request.param == 2 else [list(range(PROMPTS * N))]
    order = [i for half in halves for i in half]
    for number, (name, result) in enumerate(native.items()):
        run = result["run"]
        threshold = (
            run.rollout_correction.rollout_is_threshold if run.rollout_correction.rollout_is == "token" else None
        )
        cases[name] = {
            "model": str(model_dirs.get(name.removeprefix("LoRA, "), model_dirs[""])),
            "lora": describe_lora(run.lora),
            "adapters": result["adapters"],
            "settings": asdict(run.self_distillation),
            "batches": [
                pad_for_verl([result["samples"][i] for i in order], [old[i] for i in order], threshold)
                for old in result["old"]
            ],
            "lr": run.optim.lr,
            "temperature": run.rollout.temperature,
            "mini_batch_size": (run.actor.mini_batch_size or PROMPTS) * N,
            "loss_agg_mode": run.actor.loss_agg_mode,
            "horizon": run.rollout.max_response_length,
            # Alternate packed and padded rows, and both ways to form micro-batches.
            "use_remove_padding": number % 2 == 0,
            "max_tokens": None if number % 3 == 0 else 60,
            "micro_batch_size": 2,
            "score": True,
            "regularization": (
                run.actor.kl_loss_coef or None,
                run.actor.kl_loss_type,
                run.actor.entropy_coeff,
            ),
            "engine": {"use_no_sync_for_gradient_accumulation": number % 4 != 0},
        }
    return train_on_verl(cases, request.param)


@pytest.mark.slow
@pytest.mark.parametrize("name", all_runs())
def test_both_backends_take_the_same_steps(
    name: str,
    on_verl: dict[str, Any],
    native: dict[str, dict[str, Any]],
    assert_same_after_adamw: Callable[..., None],
) -> None:
    theirs, ours = on_verl[name], native[name]
    for step, (verl_values, values) in enumerate(zip(theirs["metrics"], ours["metrics"], strict=True)):
        for metric, verl_metric in ((metrics.LOSS, "loss"), (metrics.GRAD_NORM, "grad_norm")):
            mean = sum(verl_values[verl_metric]) / len(verl_values[verl_metric])
            assert mean == pytest.approx(values[metric], rel=1e-4, abs=1e-7), (step, metric)
        for metric in values.keys() & verl_values.keys() - {metrics.LR}:
            mean = sum(verl_values[metric]) / len(verl_values[metric])
            # After the first step, AdamW's rounding makes weights and log-probabilities differ.
            assert mean == pytest.approx(values[metric], rel=1e-4, abs=1e-5 if step else 1e-6), (step, metric)
    for weights, expected in ((theirs["students"][-1], ours["student"]), (theirs["teacher"], ours["teacher"])):
        assert weights.keys() == expected.keys()
        for weight, value in expected.items():
            assert_same_after_adamw(weights[weight], value, rtol=1e-4, atol=2e-6, lr=1e-3, msg=weight)


@pytest.mark.slow
@pytest.mark.parametrize("name", all_runs())
def test_old_log_probs_are_equal_on_both_backends(
    name: str, on_verl: dict[str, Any], native: dict[str, dict[str, Any]]
) -> None:
    for scores, old in zip(on_verl[name]["scores"], native[name]["old"], strict=True):
        mine = [0, 1, 4, 5] if len(scores["log_probs"]) < len(old) else range(len(old))  # of rank 0 of two
        for log_probs, i in zip(scores["log_probs"], mine, strict=True):
            torch.testing.assert_close(log_probs, old[i], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_teacher_is_the_exponential_moving_average_of_the_student(on_verl: dict[str, Any]) -> None:
    result = on_verl["JSD"]
    for name, teacher in result["teacher_before"].items():
        for student in result["students"]:
            teacher = 0.95 * teacher + 0.05 * student[name]
        torch.testing.assert_close(result["teacher"][name], teacher, rtol=0, atol=1e-6)
    assert any(not torch.equal(result["teacher"][name], before) for name, before in result["teacher_before"].items())


@pytest.mark.slow
def test_lora_teacher_averages_the_products_of_the_adapters(on_verl: dict[str, Any]) -> None:
    """Each delta is the moving average of s B A; two ranks shard the deltas."""
    result = on_verl["LoRA"]
    assert len(result["teacher"]) == 14
    for name, before in result["teacher_before"].items():
        assert before.dtype == torch.float32 and not before.any()
        expected = before.double()
        for student, teacher in zip(result["students"], result["teachers"], strict=True):
            a, b = (student[f"{name.removesuffix('.weight')}.lora_{part}.default.weight"].double() for part in "AB")
            expected = 0.95 * expected + 0.05 * (6 / 4) * b @ a
            torch.testing.assert_close(teacher[name].double(), expected, rtol=1e-6, atol=1e-8)
        # More than 9% of the student's product. Separate averages of A and B that start at zero would give 0.5%.
        assert float(expected.abs().max()) > 0.09 * float((6 / 4 * b @ a).abs().max())
