"""Held-out accuracy with answers laid down by hand, and whose weights and which context the teacher answers with."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import nn

from sdpo.algorithm.teacher import Teacher, build_teacher
from sdpo.config.root import SDPOConfig
from sdpo.models.generation.sampling import Completion, SamplingParams
from sdpo.models.multimodal.processor import TokenPrompt
from sdpo.models.multimodal.vision_tower import VisionAdapter
from sdpo.observability.confidence import compute_wilson_interval
from sdpo.observability.metrics import ci95_names
from sdpo.rewards.base import RewardOutput, Row
from sdpo.rewards.manager import RewardManager
from sdpo.rewards.toy.hidden_rule import build_tokenizer
from sdpo.trainer import evaluator
from sdpo.trainer.data.prompts import Prompt
from sdpo.trainer.data.samples import build_samples
from sdpo.trainer.evaluator import Evaluator

MakeRun = Callable[..., SDPOConfig]
TOKENIZER = build_tokenizer()
NO_FAILURES = {"val-aux/reward/num_failures": 0}
DECODING = SamplingParams(8, 8, 1.0, 1.0, 64, [TOKENIZER.eos_token_id], 0)


class Reversal:
    def compute_score(self, row: Row, response: str) -> RewardOutput:
        right = response == row.ground_truth
        return RewardOutput(float(right), None if right else f"Expected: {row.ground_truth}")


def prompt(text: str, source: str = "near") -> Prompt:
    messages = [{"role": "user", "content": text}]
    ids = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    return Prompt(Row(source, messages, {"ground_truth": text[::-1]}), list(ids))


PROMPTS = [prompt("123"), prompt("456"), prompt("78", "far"), prompt("90", "far")]


class Scripted:
    """Stands in for decoding: what each module answers, by the text that it is given."""

    def __init__(self) -> None:
        self.answers: dict[nn.Module, Callable[[str, int], str]] = {}
        self.calls: list[tuple[nn.Module, list[list[int]], SamplingParams, int]] = []

    def __call__(
        self,
        policy: Any,
        prompts: Sequence[TokenPrompt],
        decoding: SamplingParams,
        seed: int,
        vision: VisionAdapter | None,
    ) -> Any:
        module = policy[0][0]
        self.calls.append((module, [list(p.token_ids) for p in prompts], decoding, seed))
        texts = [TOKENIZER.decode(list(p.token_ids)) for p in prompts]
        return [
            [Completion(TOKENIZER(self.answers[module](text, k))["input_ids"], [], True) for k in range(decoding.n)]
            for text in texts
        ]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    scripted = Scripted()
    monkeypatch.setattr(evaluator, "sample_responses", scripted)
    return scripted


def evaluate(run: SDPOConfig, student: nn.Module, teacher: Teacher | None) -> dict[str, float]:
    reward_manager = RewardManager(Reversal(), run.reward)
    return Evaluator(run.eval, run.self_distillation, reward_manager, TOKENIZER, PROMPTS, DECODING, None).evaluate(
        student, teacher
    )  # type: ignore[arg-type]


def copier(text: str, _: int) -> str:
    """Answers what the feedback says; without any, nothing."""
    return text.split("Expected: ")[1].split("\n")[0] if "Expected: " in text else ""


def means(values: dict[str, float]) -> dict[str, float]:
    """Without their intervals."""
    return {name: value for name, value in values.items() if "/ci95_" not in name}


def test_greedy_accuracy_by_data_source(make_run: MakeRun, scripted: Scripted) -> None:
    student = nn.Linear(1, 1)
    scripted.answers[student] = lambda text, _: "321" if "123" in text else "87" if "78" in text else "09"
    values = evaluate(make_run(), student, None)
    assert means(values) == {"val-core/near/acc/mean@1": 0.5, "val-core/far/acc/mean@1": 1.0, **NO_FAILURES}
    ends = [values[name] for name in ci95_names("val-core/near/acc/mean@1")]
    assert ends == pytest.approx(compute_wilson_interval(0.5, 2))
    [(_, ids, decoding, _)] = scripted.calls
    assert ids == [p.token_ids for p in PROMPTS]
    assert (decoding.n, decoding.temperature) == (1, 0.0)


def test_accuracy_of_several_samples(make_run: MakeRun, scripted: Scripted) -> None:
    student = nn.Linear(1, 1)
    right = {"123": [0, 2], "456": [], "78": [3], "90": [0, 1, 2, 3]}

    def answer(text: str, k: int) -> str:
        return next(digits[::-1] if k in places else "0" for digits, places in right.items() if digits in text)

    scripted.answers[student] = answer
    values = evaluate(make_run(eval__n=4, eval__temperature=0.6, eval__top_p=0.9), student, None)
    assert means(values) == {
        "val-core/near/acc/mean@1": 0.5,
        "val-core/far/acc/mean@1": 0.5,
        "val-core/near/acc/mean@4": 0.25,
        "val-core/far/acc/mean@4": 5 / 8,
        "val-core/near/acc/best@4/mean": 0.5,
        "val-core/far/acc/best@4/mean": 1.0,
        **NO_FAILURES,
    }
    greedy, several = (call[2] for call in scripted.calls)
    assert (greedy.n, greedy.temperature) == (1, 0.0)
    assert (several.n, several.temperature, several.top_p) == (4, 0.6, 0.9)


def test_what_cannot_be_graded_is_left_out_and_counted(make_run: MakeRun, scripted: Scripted) -> None:
    """Where 0 would be the score, nobody would see that the grader failed."""

    class Fails:
        def compute_score(self, row: Row, response: str) -> float:
            if response == "13":
                raise ZeroDivisionError
            return float(response == row.ground_truth)

    student = nn.Linear(1, 1)
    answers = {"123": ["321", "13", "0", "13"], "456": ["13"] * 4, "78": ["13", "87", "87", "0"], "90": ["0"] * 4}
    scripted.answers[student] = lambda text, k: next(a[k] for digits, a in answers.items() if digits in text)
    run = make_run(eval__n=4, reward__max_failure_fraction=0.5)
    evaluator = Evaluator(
        run.eval,
        run.self_distillation,
        RewardManager(Fails(), run.reward),
        TOKENIZER,
        PROMPTS,
        DECODING,
        None,
    )
    expected = {
        "val-core/near/acc/mean@1": 1.0,
        "val-core/far/acc/mean@1": 0.0,
        "val-core/near/acc/mean@4": 1 / 2,
        "val-core/far/acc/mean@4": 2 / 7,
        "val-core/near/acc/best@4/mean": 1.0,  # of the one prompt that has a grade
        "val-core/far/acc/best@4/mean": 0.5,
        "val-aux/reward/num_failures": 2 + 7,
    }
    assert means(evaluator.evaluate(student, None)) == expected
    assert means(evaluator.evaluate(student, None)) == expected  # counted anew each time


def test_the_teacher_answers_with_its_weights_and_its_context(make_run: MakeRun, scripted: Scripted) -> None:
    run = make_run(self_distillation__demonstration_source="none", self_distillation__include_environment_feedback=True)
    student = nn.Linear(1, 1)
    teacher = build_teacher(student, run.self_distillation)
    assert teacher.module is not None
    scripted.answers[student] = lambda text, _: "321" if "123" in text else "0"
    scripted.answers[teacher.module] = copier
    values = evaluate(run, student, teacher)
    assert means(values) == {
        "val-core/near/acc/mean@1": 0.5,
        "val-core/far/acc/mean@1": 0.0,
        # The right answer got no feedback, so its teacher has nothing to be shown.
        "val-teacher/near/prompted_fraction": 0.5,
        "val-teacher/far/prompted_fraction": 1.0,
        "val-teacher/near/acc/mean@1": 1.0,
        "val-teacher/far/acc/mean@1": 1.0,
        **NO_FAILURES,
        "val-teacher/near/acc_minus_student/mean@1": 1.0,
        "val-teacher/far/acc_minus_student/mean@1": 1.0,
    }


def test_the_teacher_s_gain_is_over_the_student_s_answers_to_the_same_prompts(
    make_run: MakeRun, scripted: Scripted
) -> None:
    student = nn.Linear(1, 1)
    run = make_run(self_distillation__demonstration_source="ground_truth")
    teacher = build_teacher(student, run.self_distillation)
    assert teacher.module is not None
    scripted.answers[student] = lambda text, _: "321" if "123" in text else "87" if "78" in text else "0"
    scripted.answers[teacher.module] = lambda text, _: "87" if "78" in text else "0"
    values = evaluate(run, student, teacher)
    assert (values["val-core/near/acc/mean@1"], values["val-teacher/near/acc/mean@1"]) == (0.5, 0.0)
    # Differences -1 and 0: mean -0.5, standard error sqrt(2 * 0.5) / 2 = 0.5.
    assert values["val-teacher/near/acc_minus_student/mean@1"] == -0.5
    ends = [values[name] for name in ci95_names("val-teacher/near/acc_minus_student/mean@1")]
    assert ends == pytest.approx([-0.5 - 1.96 * 0.5, -0.5 + 1.96 * 0.5], abs=1e-3)
    assert values["val-teacher/far/acc_minus_student/mean@1"] == 0.0


@pytest.mark.parametrize("source", ["none", "successful_rollout", "ground_truth"])
def test_the_teacher_s_context_is_that_of_training(make_run: MakeRun, scripted: Scripted, source: str) -> None:
    run = make_run(
        eval__n=2,
        self_distillation__demonstration_source=source,
        self_distillation__include_environment_feedback=source == "none",
    )
    student = nn.Linear(1, 1)
    teacher = build_teacher(student, run.self_distillation)
    assert teacher.module is not None

    def answer(text: str, k: int) -> str:
        return "321" if k == 1 and "123" in text else str(k)

    scripted.answers |= {student: answer, teacher.module: copier}
    values = evaluate(run, student, teacher)
    [contexts] = [ids for module, ids, _, _ in scripted.calls if module is teacher.module]
    responses = [
        [Completion(TOKENIZER(answer(TOKENIZER.decode(p.token_ids), k))["input_ids"], [], True) for k in range(2)]
        for p in PROMPTS
    ]
    samples = build_samples(
        RewardManager(Reversal(), run.reward),
        TOKENIZER,
        PROMPTS,
        responses,
        run.self_distillation,
        None,
        random.Random(0),
    )
    shown = {
        i: next((s.teacher_prompt.token_ids for s in samples if s.prompt is p and s.is_distilled), None)
        for i, p in enumerate(PROMPTS)
    }
    assert contexts == [ids for ids in shown.values() if ids is not None]
    assert len(contexts) == {"none": 4, "successful_rollout": 1, "ground_truth": 4}[source]
    assert (
        values["val-teacher/near/prompted_fraction"]
        == {"none": 1, "successful_rollout": 0.5, "ground_truth": 1}[source]
    )
    assert (
        values["val-teacher/far/prompted_fraction"] == {"none": 1, "successful_rollout": 0, "ground_truth": 1}[source]
    )
    assert ("val-teacher/far/acc/mean@1" in values) == (source != "successful_rollout")


def test_the_trust_region_s_teacher_is_both_models(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(self_distillation__teacher_regularization="trust-region", self_distillation__ema_update_rate=0.25)
    student = nn.Linear(1, 1)
    teacher = build_teacher(student, run.self_distillation)
    policies = []

    def respond(policy: Any, prompts: Sequence[TokenPrompt], decoding: SamplingParams, seed: int, vision: Any) -> Any:
        policies.append(list(policy))
        return [[Completion([5], [], True)] * decoding.n for _ in prompts]

    monkeypatch.setattr(evaluator, "sample_responses", respond)
    evaluate(run, student, teacher)
    assert policies == [[(student, 1.0)], [(teacher.module, 0.75), (student, 0.25)]]


@pytest.mark.parametrize(
    "settings", [{"eval__evaluate_teacher": False}, {"self_distillation__policy_loss_weight": 1.0}]
)
def test_no_teacher_is_asked(make_run: MakeRun, scripted: Scripted, settings: dict[str, Any]) -> None:
    run = make_run(**settings)
    student = nn.Linear(1, 1)
    teacher = build_teacher(student, run.self_distillation) if run.self_distillation.distills else None
    scripted.answers[student] = lambda *_: "0"
    values = evaluate(run, student, teacher)
    assert means(values) == {"val-core/near/acc/mean@1": 0.0, "val-core/far/acc/mean@1": 0.0, **NO_FAILURES}


def test_every_evaluation_draws_the_same_noise(make_run: MakeRun, make_model: Any) -> None:
    model = make_model(vocab_size=len(TOKENIZER))
    run = make_run(eval__n=3)

    class Length:
        def compute_score(self, row: Row, response: str) -> float:
            return float(sum(map(ord, response)) % 97)

    evaluator = Evaluator(
        run.eval,
        run.self_distillation,
        RewardManager(Length(), run.reward),
        TOKENIZER,
        PROMPTS,
        DECODING,
        None,
    )
    assert evaluator.evaluate(model, None) == evaluator.evaluate(model, None)
