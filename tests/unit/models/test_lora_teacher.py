"""The teacher of a student with adapters: the average of s B A against its formula, and the shared base model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdpo.algorithm.teacher import Teacher
from sdpo.config.model import LoraConfig
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.models.lora.adapters import MergedParameters, add_adapters, get_adapted_layers
from sdpo.models.lora.teacher import build_lora_teacher

MakeModel = Callable[..., Any]
IDS = torch.tensor([[5, 6, 7, 8, 3]])
RATE, SCALE, STEPS = 0.05, 6 / 4, 7
KINDS = ("ema", "trust-region", "frozen", "live", "snapshot")


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits.clone()


def build(make_model: MakeModel, kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, Teacher]:
    student = make_model(dtype=dtype)
    add_adapters(student, LoraConfig(rank=4, alpha=6))
    return student, build_lora_teacher(student, SelfDistillationConfig(teacher_regularization=kind, **settings))


def move(student: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Train a student; yields s B A of each layer in float64 after each step."""
    generator = torch.Generator().manual_seed(1)
    while True:
        with torch.no_grad():
            for param in student.parameters():
                if param.requires_grad:
                    param.add_(0.1 * torch.randn(param.shape, generator=generator))
        yield {name: product(layer) for name, layer in get_adapted_layers(student).items()}


def product(layer: Any) -> Tensor:
    a, b = (getattr(layer, part)["default"].weight.detach().double() for part in ("lora_A", "lora_B"))
    return SCALE * b @ a


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_teacher_equals_the_student(make_model: MakeModel, kind: str, dtype: torch.dtype) -> None:
    student, teacher = build(make_model, kind, dtype)
    expected = logits_of(student)
    assert all(torch.equal(logits_of(module), expected) for module, _ in teacher.policy(student))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_teacher_averages_the_product_of_the_adapters(make_model: MakeModel, dtype: torch.dtype) -> None:
    student, teacher = build(make_model, "ema", dtype, ema_update_rate=RATE)
    base = {
        name: layer.get_base_layer().weight.detach().double() for name, layer in get_adapted_layers(student).items()
    }
    expected = {name: torch.zeros_like(weight) for name, weight in base.items()}
    students = move(student)
    for _ in range(STEPS):
        deltas = next(students)
        expected = {name: (1 - RATE) * value + RATE * deltas[name] for name, value in expected.items()}
        teacher.update(student)
        assert teacher.weights is not None and teacher.module is not None
        assert list(teacher.weights.values) == [f"{name}.weight" for name in expected]
        for name, value in expected.items():
            own = teacher.weights.values[f"{name}.weight"]
            assert own.dtype == torch.float32
            torch.testing.assert_close(own.double(), value, rtol=1e-6, atol=1e-7)
            weight = teacher.module.get_parameter(f"{name}.weight")
            rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(weight.double(), base[name] + value, rtol=rounding, atol=1e-6)
    # Separate averages of A and B, or another initial teacher, would differ by much more.
    ratio = max(float(value.abs().max() / deltas[name].abs().max()) for name, value in expected.items())
    assert 0.05 < ratio < 0.5


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "live"])
def test_base_weights_are_shared_and_constant(make_model: MakeModel, kind: str) -> None:
    student, teacher = build(make_model, kind, teacher_sync_steps=1)
    assert teacher.module is not None
    plain = dict(make_model().named_parameters())
    students = move(student)
    for _ in range(3):
        next(students)
        teacher.update(student)
    own = {param.data_ptr() for param in student.parameters()}
    adapted = {f"{name}.weight" for name in get_adapted_layers(student)}
    moves = kind in ("ema", "snapshot")
    for name, param in teacher.module.named_parameters():
        assert (param.data_ptr() in own) != (moves and name in adapted)
        assert torch.equal(param, plain[name]) != (moves and name in adapted)
        assert not param.requires_grad
    for name, param in student.named_parameters():
        if "lora_" not in name:
            assert torch.equal(param, plain[name.replace(".base_layer.", ".")])
    assert all(param.requires_grad == ("lora_" in name) for name, param in student.named_parameters())


def test_snapshot_equals_the_student_of_its_step(make_model: MakeModel) -> None:
    student, teacher = build(make_model, "snapshot", teacher_sync_steps=2)
    students = move(student)
    expected = logits_of(student)
    for step in range(1, 6):
        next(students)
        if step % 2 == 0:
            expected = logits_of(student)
        teacher.update(student)
        [(module, _)] = teacher.policy(student)
        torch.testing.assert_close(logits_of(module), expected, rtol=1e-5, atol=1e-5)
    assert (logits_of(student) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_teacher_resumes_from_its_state(make_model: MakeModel, kind: str, dtype: torch.dtype) -> None:
    settings = {"ema_update_rate": 0.3, "teacher_sync_steps": 2}
    student, teacher = build(make_model, kind, dtype, **settings)
    students = move(student)
    for _ in range(3):
        next(students)
        teacher.update(student)
    other, again = build(make_model, kind, dtype, **settings)
    other.load_state_dict(student.state_dict())
    again.load_state_dict(teacher.state_dict())
    for _ in range(2):
        for (one, _), (two, _) in zip(teacher.policy(student), again.policy(other), strict=True):
            assert torch.equal(logits_of(one), logits_of(two))
        next(students)
        other.load_state_dict(student.state_dict())
        teacher.update(student)
        again.update(other)
    assert again.num_steps == teacher.num_steps == 5
    moves = kind in ("ema", "snapshot")
    assert (teacher.state_dict()["weights"] is not None) == moves


def test_teacher_equals_the_average_of_merged_models(make_model: MakeModel) -> None:
    """The equivalent teacher without adapters: (1 - r) W + r (W + s B A) is W + r s B A."""
    student, teacher = build(make_model, "ema", ema_update_rate=0.25)
    next(move(student))
    teacher.update(student)
    assert teacher.module is not None
    average, merged = make_model(), MergedParameters(student)
    with torch.no_grad():
        for name, param in average.named_parameters():
            param.lerp_(merged[name], 0.25)
    torch.testing.assert_close(logits_of(teacher.module), logits_of(average), rtol=1e-5, atol=1e-5)
