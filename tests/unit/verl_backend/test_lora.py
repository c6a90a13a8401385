"""LoRA on verl's engine: memory, checkpoints, weight sync, offloading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from sdpo.algorithm.teacher import Teacher
from sdpo.config.model import LoraConfig
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.models.lora.adapters import get_adapted_layers
from sdpo.rewards.toy.hidden_rule import build_tokenizer
from sdpo.trainer.data.samples import TrainingSample
from sdpo.verl_backend.worker.lora import build_lora_teacher, wrap_with_adapters

RANK, ALPHA = 4, 6
SCALE = ALPHA / RANK
VOCABULARY = 20_000
BFLOAT16 = {"param_dtype": "bf16", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}

IDS = torch.tensor([[5, 6, 7, 8, 3]])
RATE = 0.3

TrainOnVerl = Callable[..., dict[str, Any]]


# ---- one rank in this process, without verl ----


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def build(mesh: DeviceMesh, make_model: Callable[..., PreTrainedModel]) -> Callable[..., tuple[Any, Teacher]]:
    def build(kind: str, **settings: Any) -> tuple[Any, Teacher]:
        student: Any = wrap_with_adapters(make_model(), LoraConfig(rank=RANK, alpha=ALPHA))
        for layer in student.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(student, mesh=mesh)
        settings = {"teacher_regularization": kind, "ema_update_rate": RATE, **settings}
        return student.train(), build_lora_teacher(student, SelfDistillationConfig(**settings))

    return build


@torch.no_grad()
def move(student: nn.Module, seed: int) -> dict[str, Tensor]:
    """Change the adapters; return s B A by the plain model's names, in float64."""
    generator = torch.Generator().manual_seed(seed)
    products = {}
    for name, layer in get_adapted_layers(student).items():
        a, b = (getattr(layer, f"lora_{part}")["default"].weight.to_local() for part in "AB")
        for part in (a, b):
            part.copy_(0.3 * torch.randn(part.shape, generator=generator))
        products[f"{name.removeprefix('base_model.model.')}.weight"] = SCALE * b.double() @ a.double()
    return products


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(input_ids=IDS).logits.clone()


@torch.no_grad()
def plain_logits(model: PreTrainedModel, deltas: dict[str, Tensor]) -> Tensor:
    for name, delta in deltas.items():
        model.get_parameter(name).add_(delta)
    return logits_of(model)


@pytest.mark.parametrize("kind", ["ema", "snapshot", "frozen", "trust-region", "live"])
def test_teacher_applies_its_deltas_in_the_student_module(
    kind: str, build: Callable[..., tuple[Any, Teacher]], make_model: Callable[..., PreTrainedModel]
) -> None:
    student, teacher = build(kind, teacher_sync_steps=2)
    deltas: dict[str, Tensor] = {}
    for step in range(3):
        products = move(student, step)
        if kind == "ema":
            deltas = {name: (1 - RATE) * deltas.get(name, 0) + RATE * value for name, value in products.items()}
        elif kind == "snapshot" and step == 1:
            deltas = products
        teacher.update(student)
    expected = {"student": plain_logits(make_model(), products), "teacher": plain_logits(make_model(), deltas)}
    policy = teacher.policy(student)
    assert [coefficient for _, coefficient in policy] == ([1 - RATE, RATE] if kind == "trust-region" else [1.0])
    for module, _ in policy:
        of = "student" if module is student else "teacher"
        torch.testing.assert_close(logits_of(module), expected[of], rtol=1e-5, atol=1e-5)
        # The student is unchanged, in the same mode.
        torch.testing.assert_close(logits_of(student), expected["student"], rtol=1e-5, atol=1e-5)
        assert student.training and all(layer.training for layer in get_adapted_layers(student).values())
    assert (expected["student"] - expected["teacher"]).abs().max() > 0.1


def test_teacher_update_computes_one_delta_at_a_time(
    build: Callable[..., tuple[Any, Teacher]], count_peak: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdpo.algorithm.ema.ENTRIES_AT_ONCE", 1)
    student, teacher = build("ema")
    move(student, 0)
    assert teacher.weights is not None
    sizes = [4 * value.numel() for value in teacher.weights.values.values()]
    # The delta that is averaged, the next one and its product before scaling; and the gathered A.
    assert count_peak(lambda: teacher.update(student)) < 3.5 * max(sizes) < sum(sizes) / 2


def test_student_is_unchanged_after_an_error_in_the_teacher_pass(build: Callable[..., tuple[Any, Teacher]]) -> None:
    student, teacher = build("ema")
    move(student, 0)
    before = logits_of(student)
    assert teacher.module is not None
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        teacher.module()
    assert student.training
    assert torch.equal(logits_of(student), before)


# ---- verl's engine, in separate processes ----


@pytest.fixture(scope="module")
def samples(make_samples: Callable[..., list[TrainingSample]]) -> list[TrainingSample]:
    return make_samples(8, seed=5, undistilled=(2,))


@pytest.fixture(scope="module")
def base(
    make_model: Callable[..., PreTrainedModel],
    tmp_path_factory: pytest.TempPathFactory,
    samples: list[TrainingSample],
    pad_for_verl: Callable[..., dict[str, Tensor]],
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    old = [torch.tensor(sample.response.log_probs) for sample in samples]
    return {
        "model": str(folder),
        "lora": {"lora_rank": RANK, "lora_alpha": ALPHA, "lora": {"merge": True}},
        "settings": {"alpha": 0.5},
        "batches": [pad_for_verl(samples, old, 2.0)] * 2,
        "lr": 1e-2,
        "temperature": 1.0,
        "mini_batch_size": 8,
        "loss_agg_mode": "token-mean",
        "horizon": 8,
        "use_remove_padding": True,
        "max_tokens": 60,
        "micro_batch_size": 2,
        "engine": {},
        "send": True,
    }


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def results(request: pytest.FixtureRequest, base: dict[str, Any], train_on_verl: TrainOnVerl) -> dict[str, Any]:
    cases = {
        "plain": {**base, "score_base": True},
        "offloaded": {**base, "engine": {"param_offload": True, "optimizer_offload": True}},
        "not resharded": {**base, "engine": {"reshard_after_forward": False}},
        "gradient checkpointing": {**base, "gradient_checkpointing": True},
        "half precision": {**base, "engine": {"model_dtype": "bf16", "mixed_precision": BFLOAT16}},
        "unknown layer": {**base, "lora": {**base["lora"], "target_modules": ["query"]}, "may_fail": True},
    }
    return {**train_on_verl(cases, request.param), "num_ranks": request.param}


def merge(student: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return W + s B A by the plain model's names, in the data type of W."""
    merged = {}
    for name, value in student.items():
        if "lora_" in name:
            continue
        layer = name.removesuffix(".base_layer.weight")
        if layer != name:
            a, b = (student[f"{layer}.lora_{part}.default.weight"].double() for part in "AB")
            value = (value.double() + SCALE * b @ a).to(value.dtype)
        merged[name.replace(".base_layer.", ".")] = value
    return merged


@pytest.mark.slow
def test_only_adapters_train_and_every_row_is_initialized(
    results: dict[str, Any], make_model: Callable[..., PreTrainedModel]
) -> None:
    first, last = results["plain"]["students"]
    plain = make_model().state_dict()
    for name, value in last.items():
        if "lora_" in name:
            assert not torch.equal(first[name], value), name
            assert value.abs().sum(1).all(), f"{name} has rows that no rank has drawn"
        else:
            assert torch.equal(value, plain[name.replace(".base_layer.", ".")]), name
    assert sum("lora_" in name for name in last) == 2 * 14


@pytest.mark.slow
def test_adapters_and_deltas_are_float32_in_half_precision(results: dict[str, Any]) -> None:
    result = results["half precision"]
    for name, value in result["students"][-1].items():
        assert value.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name
    assert all(delta.dtype == torch.float32 for delta in result["teacher"].values())
    plain = results["plain"]["metrics"]
    for values, expected in zip(result["metrics"], plain, strict=True):
        assert values["loss"] == pytest.approx(expected["loss"], rel=0.05)
        assert values["grad_norm"][0] == pytest.approx(expected["grad_norm"][0], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "half precision"])
def test_teacher_stores_only_its_deltas(
    name: str, results: dict[str, Any], make_model: Callable[..., PreTrainedModel]
) -> None:
    model, ranks = make_model(), results["num_ranks"]
    adapted = [p for weight, p in model.named_parameters() if weight.endswith("proj.weight")]
    adapters = RANK * sum(sum(p.shape) for p in adapted)
    size = 4 if name == "plain" else 2
    assert len(adapted) == 14
    assert results[name]["kept"] == {
        "weights": (sum(p.numel() for p in model.parameters()) * size + adapters * 4) // ranks,
        "deltas": sum(p.numel() for p in adapted) * 4 // ranks,
        "moments": 2 * adapters * 4 // ranks,
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "half precision", "offloaded"])
def test_weight_sync_sends_merged_weights_and_does_not_change_the_student(name: str, results: dict[str, Any]) -> None:
    result = results[name]
    student = result["students"][-1]
    merged = merge(student)
    assert result["sent"].keys() == merged.keys()
    for weight, value in merged.items():
        # verl sends bfloat16, vLLM's data type; in half precision W + s B A is rounded twice.
        tolerance = 2.0**-7 if name == "half precision" else 2.0**-8
        torch.testing.assert_close(result["sent"][weight].float(), value.float(), rtol=tolerance, atol=1e-6)
    changed = [w for w, value in merged.items() if not torch.equal(result["sent"][w], student.get(w, value).bfloat16())]
    assert all(weight.endswith("proj.weight") for weight in changed)
    for weight, value in student.items():
        assert torch.equal(result["after sending"][weight], value), weight


@pytest.mark.slow
@pytest.mark.parametrize("name", ["offloaded", "not resharded", "gradient checkpointing"])
def test_offloading_resharding_and_recomputation_do_not_change_weights(name: str, results: dict[str, Any]) -> None:
    for step in range(2):
        for part in ("students", "teachers"):
            for weight, value in results["plain"][part][step].items():
                assert torch.equal(results[name][part][step][weight], value), weight


@pytest.mark.slow
def test_training_does_not_change_the_policy_without_adapters(results: dict[str, Any]) -> None:
    """verl uses this policy as the reference policy of an actor with adapters."""
    first, second = (scores["log_probs"] for scores in results["plain"]["base_scores"])
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.slow
def test_unknown_target_module_is_reported(results: dict[str, Any]) -> None:
    assert "lora.target_modules: 'query' is no linear layer" in results["unknown layer"]["error"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ema", "snapshot", "frozen"])
def test_checkpoint_resumes_to_the_same_weights(
    kind: str, base: dict[str, Any], train_on_verl: TrainOnVerl, tmp_path: Path
) -> None:
    settings = {"teacher_regularization": kind, "teacher_sync_steps": 3}
    case = {**base, "settings": settings, "checkpoint": str(tmp_path / "checkpoint"), "send": False}
    result = train_on_verl({kind: case}, 2)[kind]
    assert result["loaded_steps"] == 2
    assert result["loaded_teacher"].keys() == result["teacher"].keys()
    for name, value in result["teacher"].items():
        assert torch.equal(result["loaded_teacher"][name], value), name
    went_on, loaded = result["continued"]
    for name, value in went_on.items():
        assert torch.equal(loaded[name], value), name
    # The snapshot is at the third step, so a counter that restarts would be visible.
    moved = {name: not torch.equal(went_on[f"teacher.{name}"], value) for name, value in result["teacher"].items()}
    assert len(moved) == (0 if kind == "frozen" else 14) and all(moved.values())
    assert any(value.any() for value in result["teacher"].values()) == (kind == "ema")


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["ema", "trust-region", "live"])
def test_no_tensor_is_larger_than_the_output_layer(
    teacher: str,
    base: dict[str, Any],
    make_model: Callable[..., PreTrainedModel],
    make_samples: Callable[..., list[TrainingSample]],
    pad_for_verl: Callable[..., dict[str, Tensor]],
    train_on_verl: TrainOnVerl,
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
        "buffer_bytes": 8 * VOCABULARY * 4,
        "send": False,
    }
    result = train_on_verl({"large": case}, 1)["large"]
    head = model.lm_head.weight.nbytes
    assert head < sum(len(sample.response.token_ids) for sample in samples) * VOCABULARY * 4 / 4
    assert 0 < result["largest"] <= head
    assert 0 < result["largest_of_scores"] <= head
