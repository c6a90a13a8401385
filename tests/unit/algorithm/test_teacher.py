"""The teacher: closed form of the moving average, and logits of every kind of teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sdpo
from sdpo import SelfDistillationConfig
from sdpo.algorithm.teacher import Teacher, build_teacher

KINDS = ("ema", "trust-region", "frozen", "live", "snapshot")
DTYPES = (torch.float32, torch.bfloat16)


# The moving average


def test_one_ema_update() -> None:
    teacher, student = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 2.0])
    address = teacher.data_ptr()
    assert sdpo.update_teacher_ema([teacher], [student], 0.25) is None
    assert teacher.tolist() == [1.5, -1.0]
    assert student.tolist() == [3.0, 2.0]
    assert teacher.data_ptr() == address


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.5, 0.9])
def test_many_ema_updates_equal_the_closed_form(rate: float) -> None:
    """teacher_t = (1-r)^t theta_0 + sum over s of r (1-r)^(t-s) theta_s, with a student that changes."""
    rng = np.random.default_rng(0)
    start, students = rng.normal(size=(2, 3)), rng.normal(size=(60, 2, 3))
    teacher = torch.from_numpy(start.copy())
    for student in students:
        sdpo.update_teacher_ema([teacher], [torch.from_numpy(student)], rate)
    steps = len(students)
    expected = (1 - rate) ** steps * start
    expected = expected + sum(rate * (1 - rate) ** (steps - 1 - s) * students[s] for s in range(steps))
    np.testing.assert_allclose(teacher.numpy(), expected, atol=1e-14)


def test_rates_0_and_1_are_exact() -> None:
    start, student = torch.tensor([0.1, 1e-8, 3e7]), torch.tensor([-7.3, 1e9, 0.3])
    for rate, expected in ((0.0, start), (1.0, student)):
        teacher = start.clone()
        sdpo.update_teacher_ema([teacher], [student], rate)
        assert torch.equal(teacher, expected)


def test_float32_average_of_a_bfloat16_student_converges() -> None:
    """After 200 steps at rate 0.05, 0.95^200 of the gap remains; in bfloat16 more than 0.9 remains."""
    start, target = torch.full((8,), 1.0), torch.full((8,), 1.0625)
    assert torch.equal(target.bfloat16().float(), target)
    average, bfloat16_average = start.clone(), start.bfloat16()
    for _ in range(200):
        sdpo.update_teacher_ema([average], [target.bfloat16()], 0.05)
        bfloat16_average.lerp_(target.bfloat16(), 0.05)
    gap, bfloat16_gap = ((target - x.float()).abs().max().item() / 0.0625 for x in (average, bfloat16_average))
    assert gap == pytest.approx(0.95**200, abs=2e-5)
    assert bfloat16_gap > 0.9


def test_ema_update_accepts_iterables() -> None:
    student, teacher = nn.Linear(3, 2), nn.Linear(3, 2).double()
    before = [p.detach().clone() for p in teacher.parameters()]
    sdpo.update_teacher_ema(teacher.parameters(), (p.bfloat16() for p in student.parameters()), 0.5)
    for after, start, other in zip(teacher.parameters(), before, student.parameters(), strict=True):
        torch.testing.assert_close(after.detach(), (start + other.detach().bfloat16().double()) / 2, rtol=0, atol=1e-15)
    sdpo.update_teacher_ema([], [], 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 7, 100, 5000])
def test_slices_and_groups_do_not_change_the_result(
    dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(97, 53), (), (5,), (0, 3), (1, 301), (31, 3, 7), (4097,)]
    teachers = [torch.randn(shape, generator=generator) for shape in shapes]
    students = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    expected = [teacher.clone() for teacher in teachers]
    torch._foreach_lerp_(expected, [student.float() for student in students], 0.05)
    monkeypatch.setattr("sdpo.algorithm.ema.ENTRIES_AT_ONCE", at_once)
    sdpo.update_teacher_ema(teachers, students, 0.05)
    for one, other in zip(teachers, expected, strict=True):
        assert torch.equal(one, other)


def test_ema_update_casts_limited_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    lerp = torch._foreach_lerp_

    def count(teachers: list[Tensor], students: list[Tensor], rate: float) -> None:
        counts.append(sum(student.numel() for student in students))
        lerp(teachers, students, rate)

    monkeypatch.setattr("sdpo.algorithm.ema.ENTRIES_AT_ONCE", 1000)
    monkeypatch.setattr(torch, "_foreach_lerp_", count)
    shapes = [(300, 20), (10, 10), (10, 10), (3, 1000)]
    sdpo.update_teacher_ema([torch.zeros(s) for s in shapes], [torch.ones(s).bfloat16() for s in shapes], 0.5)
    assert counts == [1000] * 6 + [200, *[1000] * 3]


@pytest.mark.parametrize(
    ("teacher", "student", "rate", "message"),
    [
        ([torch.zeros(2)], [torch.zeros(2)], -0.1, r"ema_rate must be in \[0, 1\], got -0.1"),
        ([torch.zeros(2)], [torch.zeros(2)], 1.01, r"ema_rate must be in \[0, 1\], got 1.01"),
        ([torch.zeros(2)], [torch.zeros(2)], float("nan"), "ema_rate must be in"),
        ([torch.zeros(2)], [torch.zeros(3)], 0.1, "same shapes, in the same order"),
        ([torch.zeros(1)], [torch.zeros(3)], 0.1, "same shapes, in the same order"),
        ([torch.zeros(2), torch.zeros(3)], [torch.zeros(3), torch.zeros(2)], 0.1, "same shapes, in the same order"),
        ([torch.zeros(2)], [torch.zeros(2), torch.zeros(2)], 0.1, "same shapes, in the same order"),
        ([torch.zeros(2)], [], 0.1, "same shapes, in the same order"),
        ([torch.zeros(2), torch.zeros(1).bfloat16()], [torch.ones(2), torch.ones(1)], 0.1, "must be float32.*bfloat16"),
        ([torch.zeros(2).half()], [torch.ones(2).half()], 0.1, "must be float32.*float16"),
    ],
)
def test_invalid_arguments_of_the_ema_update_are_refused(
    teacher: list[Tensor], student: list[Tensor], rate: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sdpo.update_teacher_ema(teacher, student, rate)
    assert all((t == 0).all() for t in teacher)


# The kinds of teacher


class Tiny(nn.Module):
    """A linear model with a tied weight, and with a dropout that must be off in the teacher."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4)
        with torch.no_grad():
            for param in (self.first.weight, self.second.weight, self.second.bias):
                param.copy_(torch.randn(param.shape, generator=generator))
        self.second.weight = self.first.weight
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.dropout(self.first(x)))


X = torch.tensor([[0.5, -1.0, 2.0, 0.25], [1.0, 0.0, -0.5, 3.0]])


def copy_weights(module: nn.Module) -> list[np.ndarray[Any, Any]]:
    return [p.detach().double().numpy().copy() for p in module.parameters()]


def compute_logits(weights: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    w, b = weights
    return X.double().numpy() @ w.T @ w.T + b


def teacher_logits(teacher: Teacher, student: nn.Module) -> np.ndarray[Any, Any]:
    """Logits of the teacher in float64, so that only the weights have the model's precision."""
    total = 0.0
    for module, coefficient in teacher.policy(student):
        total = total + coefficient * compute_logits(copy_weights(module))
    return np.asarray(total)


def perturb(student: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    with torch.no_grad():
        for param in student.parameters():
            param.add_(0.1 * torch.randn(param.shape, generator=generator).to(param.dtype))


def build(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Tiny, Teacher]:
    student = Tiny().to(dtype)
    student.train()
    return student, build_teacher(student, SelfDistillationConfig(teacher_regularization=kind, **settings))


RATE, SYNC_STEPS, STEPS = 0.3, 3, 8
History = list[list[np.ndarray[Any, Any]]]


def compute_ema_logits(history: History) -> np.ndarray[Any, Any]:
    average = history[0]
    for weights in history[1:]:
        average = [(1 - RATE) * a + RATE * w for a, w in zip(average, weights, strict=True)]
    return compute_logits(average)


EXPECTED: dict[str, Callable[[History], np.ndarray[Any, Any]]] = {
    "ema": compute_ema_logits,
    "trust-region": lambda history: (1 - RATE) * compute_logits(history[0]) + RATE * compute_logits(history[-1]),
    "frozen": lambda history: compute_logits(history[0]),
    "live": lambda history: compute_logits(history[-1]),
    "snapshot": lambda history: compute_logits(history[(len(history) - 1) // SYNC_STEPS * SYNC_STEPS]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_every_kind_of_teacher(kind: str, dtype: torch.dtype) -> None:
    student, teacher = build(kind, dtype, ema_update_rate=RATE, teacher_sync_steps=SYNC_STEPS)
    history = [copy_weights(student)]
    np.testing.assert_allclose(teacher_logits(teacher, student), compute_logits(history[0]), atol=1e-5)
    # Rounding of the average in the bfloat16 module: 2^-9 of weights up to 3, twice, times inputs up to 3.
    tolerance = 0.15 if (kind, dtype) == ("ema", torch.bfloat16) else 2e-5
    for step in range(1, STEPS + 1):
        perturb(student, step)
        history.append(copy_weights(student))
        if kind == "trust-region":
            # Before the teacher update, the mixture uses the current student too.
            np.testing.assert_allclose(teacher_logits(teacher, student), EXPECTED[kind](history), atol=tolerance)
        teacher.update(student)
        np.testing.assert_allclose(teacher_logits(teacher, student), EXPECTED[kind](history), atol=tolerance)
    # The kinds differ by more than the tolerance, so that the test distinguishes them.
    others = [EXPECTED[other](history) for other in KINDS if other != kind]
    assert all(np.abs(teacher_logits(teacher, student) - other).max() > 0.3 for other in others)


def test_logits_equal_the_forward_pass() -> None:
    student, teacher = build("trust-region", ema_update_rate=RATE)
    perturb(student, 1)
    student.eval()
    with torch.no_grad():
        total = sum(coefficient * module(X) for module, coefficient in teacher.policy(student))
    np.testing.assert_allclose(total.numpy(), teacher_logits(teacher, student), atol=1e-5)


def test_trust_region_is_a_geometric_mixture() -> None:
    student, teacher = build("trust-region", ema_update_rate=RATE)
    start = compute_logits(copy_weights(student))
    perturb(student, 1)

    def softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)

    mixture = softmax(start) ** (1 - RATE) * softmax(compute_logits(copy_weights(student))) ** RATE
    np.testing.assert_allclose(
        softmax(teacher_logits(teacher, student)), mixture / mixture.sum(-1, keepdims=True), atol=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_average_of_a_model_converges(dtype: torch.dtype) -> None:
    student, teacher = build("ema", dtype, ema_update_rate=0.05)
    start = copy_weights(student)
    with torch.no_grad():
        for param in student.parameters():
            param.mul_(1.0625)  # a bfloat16 average would not change at this rate
    target = copy_weights(student)
    for _ in range(200):
        teacher.update(student)
    assert teacher.module is not None
    for before, after, goal in zip(start, copy_weights(teacher.module), target, strict=True):
        # 0.95^200 of the gap remains, and the rounding error of the module's precision.
        rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
        assert (np.abs(after - goal) <= 0.95**200 * np.abs(before - goal) + rounding * np.abs(goal)).all()
        assert np.abs(before - goal).max() > 10 * rounding * np.abs(goal).max()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "live"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_teacher_and_student_share_no_memory(kind: str, dtype: torch.dtype) -> None:
    student, teacher = build(kind, dtype, ema_update_rate=1.0, teacher_sync_steps=1)
    assert teacher.module is not None

    def storages(module: nn.Module) -> set[int]:
        return {p.untyped_storage().data_ptr() for p in module.parameters()}

    for step in range(3):
        assert storages(student).isdisjoint(storages(teacher.module))
        before = copy_weights(teacher.module)
        perturb(student, step)
        for one, other in zip(before, copy_weights(teacher.module), strict=True):
            np.testing.assert_array_equal(one, other)
        # With rate 1 the teacher is a copy of the student after each step.
        teacher.update(student)
    if kind in ("ema", "snapshot"):
        for one, other in zip(copy_weights(student), copy_weights(teacher.module), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_has_no_gradients_and_the_student_is_not_modified(kind: str) -> None:
    student, teacher = build(kind)
    student(X).sum().backward()
    gradients = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    teacher.update(student)
    assert student.training
    assert student.dropout.training
    assert all(p.requires_grad for p in student.parameters())
    for param, gradient in zip(student.parameters(), gradients, strict=True):
        assert torch.equal(param.grad, gradient)
    if kind == "live":
        assert teacher.module is None
        assert [(m, c) for m, c in teacher.policy(student)] == [(student, 1.0)]
        return
    assert teacher.module is not None
    assert teacher.module is not student
    assert not any(module.training for module in teacher.module.modules())
    assert not any(p.requires_grad for p in teacher.module.parameters())
    assert torch.equal(teacher.module(X), teacher.module(X))
    assert {p.dtype for p in teacher.module.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", DTYPES)
def test_tied_weights_stay_tied_and_are_averaged_once(dtype: torch.dtype) -> None:
    student, teacher = build("ema", dtype, ema_update_rate=0.5)
    assert teacher.module is not None
    start = copy_weights(student)
    perturb(student, 1)
    teacher.update(student)
    assert teacher.module.second.weight is teacher.module.first.weight
    after = (start[0] + copy_weights(student)[0]) / 2
    np.testing.assert_allclose(
        copy_weights(teacher.module)[0], after, rtol=2.0**-8 if dtype == torch.bfloat16 else 1e-6
    )


@pytest.mark.parametrize("kind", ["trust-region", "frozen"])
def test_fixed_teacher_keeps_the_initial_weights_exactly(kind: str) -> None:
    student, teacher = build(kind, torch.bfloat16)
    start = copy_weights(student)
    for step in range(3):
        perturb(student, step)
        teacher.update(student)
    assert teacher.module is not None
    for one, other in zip(start, copy_weights(teacher.module), strict=True):
        np.testing.assert_array_equal(one, other)
