"""verl's engine beyond the loss: checkpoints, half precision, token budgets, non-finite samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from verl.workers.config import FSDPOptimizerConfig

from sdpo.observability import metrics
from sdpo.observability.metrics import UPDATE_ROUNDING
from sdpo.rewards.toy.hidden_rule import build_tokenizer
from sdpo.trainer.data.samples import TrainingSample
from sdpo.verl_backend.worker import engine as engine_module
from sdpo.verl_backend.worker.engine import SelfDistillationEngine

BUDGET = 60
VOCABULARY = 20_000
SMALL = {"optimizer_impl": "torchao.optim", "optimizer": "AdamW8bit"}
RANDOM = {
    "optimizer_impl": "torchao.optim",
    "optimizer": "_AdamW",
    "override_optimizer_config": {"bf16_stochastic_round": True},
}
BFLOAT16 = {"param_dtype": "bf16", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}


@pytest.fixture(scope="module")
def samples(make_samples: Callable[..., list[TrainingSample]]) -> list[TrainingSample]:
    return make_samples(8, seed=5, undistilled=(2,))


@pytest.fixture(scope="module")
def base(
    make_model: Callable[..., PreTrainedModel],
    tmp_path_factory: pytest.TempPathFactory,
    samples: list[TrainingSample],
    pad_for_verl: Callable[..., dict[str, torch.Tensor]],
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    old = [torch.tensor(sample.response.log_probs) for sample in samples]
    return {
        "model": str(folder),
        "settings": {"alpha": 0.5},
        "batches": [pad_for_verl(samples, old, 2.0)] * 2,
        "lr": 1e-3,
        "temperature": 1.0,
        "mini_batch_size": 8,
        "loss_agg_mode": "token-mean",
        "horizon": 8,
        "use_remove_padding": True,
        "max_tokens": BUDGET,
        "micro_batch_size": 2,
        "engine": {},
    }


def break_sample(batch: dict[str, Any], number: int | slice) -> dict[str, Any]:
    broken = {name: values.clone() for name, values in batch.items()}
    broken["old_log_probs"][number, 0] = math.nan
    return broken


def without(batch: dict[str, Any], number: int) -> dict[str, Any]:
    kept = [i for i in range(len(batch["input_ids"])) if i != number]
    return {name: values[kept] for name, values in batch.items()}


@pytest.fixture(scope="module")
def results(
    base: dict[str, Any],
    samples: list[TrainingSample],
    pad_for_verl: Callable[..., dict[str, torch.Tensor]],
    train_on_verl: Callable[..., dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("checkpoints")
    old = [torch.tensor(sample.response.log_probs) for sample in samples]
    rejected = {name: values.clone() for name, values in base["batches"][0].items()}
    rejected["response_mask"][6:] = 0
    whole = base["batches"][0]
    broken, hopeless = break_sample(whole, 3), break_sample(whole, slice(None))
    masked = {name: values.clone() for name, values in base["batches"][0].items()}
    masked["response_mask"][:, 0] = 0
    garbled = {name: values.clone() for name, values in masked.items()}
    garbled["old_log_probs"][:, 0] = -9.0
    garbled["rollout_is_weights"][:, 0] = 7.0
    cases = {
        "plain": base,
        "masked": {**base, "batches": [masked]},
        "garbled": {**base, "batches": [garbled]},
        "offloaded": {**base, "engine": {"param_offload": True, "optimizer_offload": True}},
        "not resharded": {**base, "engine": {"reshard_after_forward": False}},
        "half precision": {**base, "engine": {"model_dtype": "bf16"}},
        "half precision, small learning rate": {**base, "lr": 1e-6, "engine": {"model_dtype": "bf16"}},
        "bfloat16 products": {**base, "engine": {"mixed_precision": BFLOAT16}},
        "rejected": {**base, "batches": [rejected]},
        "without rejected": {**base, "batches": [pad_for_verl(samples[:6], old[:6], 2.0)], "mini_batch_size": 6},
        "non-finite": {**base, "batches": [broken]},
        "non-finite, padded": {**base, "batches": [broken], "use_remove_padding": False},
        "without the fourth": {**base, "batches": [without(whole, 3)], "mini_batch_size": 7},
        "without the seventh": {**base, "batches": [without(whole, 6)], "mini_batch_size": 7},
        "all non-finite, twice": {**base, "batches": [hopeless, hopeless, whole, hopeless]},
        "all non-finite, three times": {**base, "batches": [hopeless] * 3, "may_fail": True},
        "another teacher": {
            **base,
            "checkpoint": str(folder / "another"),
            "changed": {"teacher_regularization": "frozen"},
            "may_fail": True,
        },
    }
    return train_on_verl(cases, 1)


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["ema", "trust-region", "live"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_logits_of_all_tokens_are_never_allocated(
    teacher: str,
    packed: bool,
    base: dict[str, Any],
    make_model: Callable[..., PreTrainedModel],
    make_samples: Callable[..., list[TrainingSample]],
    pad_for_verl: Callable[..., dict[str, torch.Tensor]],
    train_on_verl: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    model = make_model(vocab_size=VOCABULARY)
    model.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    samples = make_samples(24, seed=2)
    case = {
        **base,
        "model": str(tmp_path),
        "settings": {"alpha": 0.5, "teacher_regularization": teacher, "policy_loss_weight": 0.3},
        "batches": [pad_for_verl(samples, [torch.tensor(sample.response.log_probs) for sample in samples], 2.0)],
        "mini_batch_size": 24,
        "max_tokens": None,
        "micro_batch_size": 24,
        "use_remove_padding": packed,
        "buffer_bytes": 8 * VOCABULARY * 4,
    }
    result = train_on_verl({"large": case}, 1)["large"]
    num_scored = sum(len(sample.response.token_ids) for sample in samples)
    head = model.lm_head.weight.nbytes  # FSDP2 gathers it; the loss computes its gradient
    assert head < num_scored * VOCABULARY * 4 / 4
    assert 0 < result["largest"] <= 2 * head
    assert 0 < result["largest_of_scores"] <= 2 * head


@pytest.mark.slow
def test_ids_beyond_the_tokenizer_have_zero_probability(
    base: dict[str, Any],
    make_model: Callable[..., PreTrainedModel],
    train_on_verl: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    """Student, teacher and old policy equal those of a model without the rows of these IDs."""
    tokenizer = build_tokenizer()
    model = make_model(vocab_size=len(tokenizer) + 24)
    cases = {}
    for name, size in (("whole", len(tokenizer) + 24), ("cut", len(tokenizer))):
        model.resize_token_embeddings(size)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        cases[name] = {**base, "model": str(tmp_path / name), "score": True}
    results = train_on_verl(cases, 1)
    whole, cut = results["whole"], results["cut"]
    for ours, wanted in zip(whole["scores"], cut["scores"], strict=True):
        for name in ("log_probs", "entropy"):
            torch.testing.assert_close(torch.cat(ours[name]), torch.cat(wanted[name]), rtol=1e-5, atol=1e-6)
    for name in ("loss", "grad_norm", metrics.DISTILLATION_LOSS, metrics.LOGPROB_DIFF_MEAN, metrics.TEACHER_ENTROPY):
        for ours, wanted in zip(whole["metrics"], cut["metrics"], strict=True):
            assert ours[name] == pytest.approx(wanted[name], rel=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "optim"), [("ema", {}), ("snapshot", {}), ("ema", SMALL), ("ema", RANDOM)])
def test_checkpoint_resumes_to_the_same_weights(
    kind: str, optim: dict[str, Any], base: dict[str, Any], train_on_verl: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    if optim:
        pytest.importorskip("torchao")
    settings = {"teacher_regularization": kind, "teacher_sync_steps": 3}
    case = {**base, "settings": settings, "optim": optim, "checkpoint": str(tmp_path / "checkpoint")}
    if optim is RANDOM:
        case["engine"] = {"model_dtype": "bf16"}
    result = train_on_verl({kind: case}, 2)[kind]
    assert result["loaded_steps"] == 2
    for name, value in result["teacher"].items():
        assert torch.equal(result["loaded_teacher"][name], value), name
    went_on, loaded = result["continued"]
    for name, value in went_on.items():
        assert torch.equal(loaded[name], value), name
    # The snapshot is at the third step, so a counter that restarts would be visible.
    moved = any(not torch.equal(went_on[f"teacher.{name}"], value) for name, value in result["teacher"].items())
    assert moved


@pytest.mark.parametrize(
    ("device", "given", "fused"),
    [
        ("cuda", {}, True),
        ("cuda", {"override_optimizer_config": {"amsgrad": True}}, True),
        ("cuda", {"override_optimizer_config": {"foreach": True}}, None),
        ("cuda", SMALL, None),
        ("cpu", {}, None),
    ],
)
def test_adamw_is_fused_on_gpus(
    device: str, given: dict[str, Any], fused: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = object.__new__(SelfDistillationEngine)
    engine.optimizer_config = FSDPOptimizerConfig(lr=1e-3, total_training_steps=1, **given)
    monkeypatch.setattr(engine_module, "get_device_name", lambda: device)
    monkeypatch.setattr(engine_module, "UpdateRounding", lambda *_: None)
    monkeypatch.setattr(engine_module.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(
        engine_module.FSDPEngineWithLMHead,
        "_build_optimizer",
        lambda self, module: self.optimizer_config.override_optimizer_config or {},
    )
    arguments: Any = engine._build_optimizer(torch.nn.Linear(1, 1))
    assert arguments.get("fused") is fused
    assert {name: value for name, value in arguments.items() if name != "fused"} == given.get(
        "override_optimizer_config", {}
    )


@pytest.mark.parametrize(
    ("given", "factors"),
    [
        ({"lr_warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1, 1]),
        ({"lr_warmup_steps_ratio": 0.2}, [0.5, 1, 1, 1, 1, 1]),
        ({}, [1] * 6),
        # After the warm-up 1/2 + cos(pi k / 8) / 2.
        ({"lr_warmup_steps": 2, "lr_scheduler_type": "cosine"}, [0.5, 1, 1, 0.9619398, 0.8535534, 0.6913417]),
    ],
)
def test_warm_up_begins_above_zero(
    given: dict[str, Any], factors: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = object.__new__(SelfDistillationEngine)
    engine.rank = 0
    engine.optimizer_config = FSDPOptimizerConfig(lr=1e-3, total_training_steps=10, **given)
    optimizer = torch.optim.AdamW(torch.nn.Linear(1, 1).parameters(), lr=1e-3)
    scheduler = engine._build_lr_scheduler(optimizer)
    used = []
    for _ in factors:
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert used == pytest.approx([1e-3 * factor for factor in factors])


@pytest.mark.slow
def test_checkpoint_of_another_teacher_regularization_is_refused(results: dict[str, Any]) -> None:
    error = results["another teacher"]["error"]
    assert "teacher_regularization=frozen: the checkpoint in" in error and "holds ema teacher" in error


@pytest.mark.slow
@pytest.mark.parametrize("name", ["offloaded", "not resharded"])
def test_offloading_and_resharding_do_not_change_weights(name: str, results: dict[str, Any]) -> None:
    for part in ("students", "teacher"):
        ours, plain = results[name][part], results["plain"][part]
        ours, plain = (ours[-1], plain[-1]) if part == "students" else (ours, plain)
        for weight, value in plain.items():
            assert torch.equal(ours[weight], value), weight


@pytest.mark.slow
def test_teacher_is_updated_before_weights_are_offloaded(results: dict[str, Any]) -> None:
    """Two steps of load, train, update teacher, offload; verl does not wait for its copies to the host."""
    assert results["offloaded"]["moves"] == ["moved", "followed", "moved"] * 2


@pytest.mark.slow
def test_ema_teacher_of_a_half_precision_student_is_averaged_in_float32(results: dict[str, Any]) -> None:
    result = results["half precision"]
    for name, teacher in result["teacher_before"].items():
        assert result["students"][0][name].dtype == torch.bfloat16
        assert teacher.dtype == result["teacher"][name].dtype == torch.float32
        for student in result["students"]:
            teacher = 0.95 * teacher + 0.05 * student[name].float()
        torch.testing.assert_close(result["teacher"][name], teacher, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_update_rounding_is_measured_only_in_half_precision(results: dict[str, Any]) -> None:
    small = [values[UPDATE_ROUNDING] for values in results["half precision, small learning rate"]["metrics"]]
    large = [values[UPDATE_ROUNDING] for values in results["half precision"]["metrics"]]
    assert min(torch.tensor(small).flatten()) > 0.9
    assert max(torch.tensor(large).flatten()) < 0.5
    assert all(UPDATE_ROUNDING not in values for values in results["plain"]["metrics"])


@pytest.mark.slow
def test_mixed_precision_steps_approximate_float32(results: dict[str, Any]) -> None:
    half, plain = results["bfloat16 products"], results["plain"]
    for step in range(2):
        values, expected = half["metrics"][step], plain["metrics"][step]
        assert values["loss"] == pytest.approx(expected["loss"], rel=0.05)
        assert values["loss"] != expected["loss"]
        assert values["grad_norm"][0] == pytest.approx(expected["grad_norm"][0], rel=0.1)
    moved = {name: value - plain["teacher_before"][name] for name, value in plain["students"][-1].items()}
    off = {name: value - half["students"][-1][name] for name, value in plain["students"][-1].items()}
    assert all(value.dtype == torch.float32 for value in half["students"][-1].values())
    assert sum(v.square().sum() for v in off.values()) < 0.1 * sum(v.square().sum() for v in moved.values())


@pytest.mark.slow
def test_token_budget_counts_teacher_tokens(results: dict[str, Any], samples: list[TrainingSample]) -> None:
    student = sum(len(s.prompt.token_ids) + len(s.response.token_ids) for s in samples)
    teacher = sum(len(s.teacher_prompt.token_ids or ()) + len(s.response.token_ids) for s in samples if s.is_distilled)
    least, without_teacher = math.ceil((student + teacher) / BUDGET), math.ceil(student / BUDGET)
    num_passes = results["plain"]["num_passes"] // 2
    assert least <= num_passes <= least + 1
    assert num_passes > without_teacher + 1


@pytest.mark.slow
def test_rejected_samples_do_not_change_the_step(results: dict[str, Any]) -> None:
    rejected, without = results["rejected"], results["without rejected"]
    assert rejected["metrics"][0]["loss"] == pytest.approx(without["metrics"][0]["loss"], rel=1e-5)
    for name, value in without["students"][0].items():
        torch.testing.assert_close(rejected["students"][0][name], value, rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_values_at_masked_tokens_do_not_change_the_step(results: dict[str, Any]) -> None:
    masked, garbled, plain = (results[name] for name in ("masked", "garbled", "plain"))
    assert masked["metrics"][0]["loss"] != plain["metrics"][0]["loss"]
    for name, value in masked["students"][0].items():
        assert torch.equal(garbled["students"][0][name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["non-finite", "non-finite, padded"])
def test_nonfinite_sample_is_excluded(name: str, results: dict[str, Any]) -> None:
    broken, wanted = results[name], results["without the fourth"]
    assert broken["metrics"][0][metrics.NONFINITE_SAMPLES] == [1.0]
    assert broken["metrics"][0][metrics.SKIPPED_UPDATES] == [0.0]
    assert wanted["metrics"][0][metrics.NONFINITE_SAMPLES] == [0.0]
    for metric in ("loss", "grad_norm", metrics.DISTILLATION_LOSS, metrics.PPO_KL):
        assert broken["metrics"][0][metric] == pytest.approx(wanted["metrics"][0][metric], rel=1e-4), metric
    for weight, value in wanted["students"][0].items():
        torch.testing.assert_close(broken["students"][0][weight], value, rtol=1e-4, atol=1e-5, msg=weight)
    assert any(not torch.equal(broken["students"][0][n], value) for n, value in broken["teacher_before"].items())


@pytest.mark.slow
def test_nonfinite_updates_are_skipped_and_three_in_a_row_are_an_error(results: dict[str, Any]) -> None:
    result = results["all non-finite, twice"]
    for values in result["metrics"][:2]:
        assert not math.isfinite(values["grad_norm"][0])
        assert values[metrics.SKIPPED_UPDATES] == [1.0]
    assert result["metrics"][2][metrics.SKIPPED_UPDATES] == [0.0]
    for name, value in result["teacher_before"].items():
        assert torch.equal(result["students"][1][name], value), name
    error = results["all non-finite, three times"]["error"]
    assert error.startswith("ConfigError: 3 updates in a row were skipped because their gradient norm is non-finite")


@pytest.mark.slow
def test_nonfinite_sample_of_one_rank_is_excluded_on_all_ranks(
    base: dict[str, Any], results: dict[str, Any], train_on_verl: Callable[..., dict[str, Any]]
) -> None:
    cases = {
        "dynamic": {**base, "batches": [break_sample(base["batches"][0], 6)]},
        "fixed": {**base, "batches": [break_sample(base["batches"][0], 6)], "max_tokens": None},
    }
    wanted = results["without the seventh"]
    for name, result in train_on_verl(cases, 2).items():
        assert result["metrics"][0][metrics.NONFINITE_SAMPLES] == [1.0], name
        assert result["metrics"][0]["grad_norm"][0] == pytest.approx(wanted["metrics"][0]["grad_norm"][0], rel=1e-4)
        for weight, value in wanted["students"][0].items():
            torch.testing.assert_close(result["students"][0][weight], value, rtol=1e-4, atol=1e-5, msg=weight)
