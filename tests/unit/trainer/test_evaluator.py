"""Validation accuracy with scripted responses, and the weights and context that the teacher uses."""

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
SAMPLING_PARAMS = SamplingParams(8, 8, 1.0, 1.0, 64, [TOKENIZER.eos_token_id], 0)


class Reversal:
    def compute_score(self, row: Row, response: str) -> RewardOutput:
        right = response == row.ground_truth
        return RewardOutput(float(right), None if right else f"Expected: {row.ground_truth}")


def prompt(text: str, source: str = "near") -> Prompt:
    messages = [{"role": "user", "content": text}]
    ids = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    return Prompt(Row(source, messages, {"ground_truth": text[::-1]}), list(ids), text[::-1])


PROMPTS = [prompt("123"), prompt("456"), prompt("78", "far"), prompt("90", "far")]


class ScriptedSampling:
    """Replacement for ``sample_responses``: a function per module maps a prompt's text to the response."""

    def __init__(self) -> None:
        self.answers: dict[nn.Module, Callable[[str, int], str]] = {}
        self.calls: list[tuple[nn.Module, list[list[int]], SamplingParams, int]] = []

    def __call__(
        self,
        policy: Any,
        prompts: Sequence[TokenPrompt],
        sampling_params: SamplingParams,
        seed: int,
        vision: VisionAdapter | None,
    ) -> Any:
        module = policy[0][0]
        self.calls.append((module, [list(p.token_ids) for p in prompts], sampling_params, seed))
        texts = [TOKENIZER.decode(list(p.token_ids)) for p in prompts]
        return [
            [
                Completion(TOKENIZER(self.answers[module](text, k))["input_ids"], [], True)
                for k in range(sampling_params.n)
            ]
            for text in texts
        ]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> ScriptedSampling:
    scripted = ScriptedSampling()
    monkeypatch.setattr(evaluator, "sample_responses", scripted)
    return scripted


def evaluate(run: SDPOConfig, student: nn.Module, teacher: Teacher | None) -> dict[str, float]:
    reward_manager = RewardManager(Reversal(), run.reward)
    return Evaluator(
        run.eval, run.self_distillation, reward_manager, TOKENIZER, PROMPTS, SAMPLING_PARAMS, None
    ).evaluate(student, teacher)  # type: ignore[arg-type]


def copy_feedback(text: str, _: int) -> str:
    """Return the solution in the feedback, or an empty response without feedback."""
    return text.split("Expected: ")[1].split("\n")[0] if "Expected: " in text else ""


def drop_intervals(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if "/ci95_" not in name}


def test_greedy_accuracy_by_data_source(make_run: MakeRun, scripted: ScriptedSampling) -> None:
    student = nn.Linear(1, 1)
    scripted.answers[student] = lambda text, _: "321" if "123" in text else "87" if "78" in text else "09"
    values = evaluate(make_run(), student, None)
    assert drop_intervals(values) == {"val-core/near/acc/mean@1": 0.5, "val-core/far/acc/mean@1": 1.0, **NO_FAILURES}
    ends = [values[name] for name in ci95_names("val-core/near/acc/mean@1")]
    assert ends == pytest.approx(compute_wilson_interval(0.5, 2))
    [(_, ids, sampling_params, _)] = scripted.calls
    assert ids == [p.token_ids for p in PROMPTS]
    assert (sampling_params.n, sampling_params.temperature) == (1, 0.0)


def test_accuracy_of_several_responses_per_prompt(make_run: MakeRun, scripted: ScriptedSampling) -> None:
    student = nn.Linear(1, 1)
    right = {"123": [0, 2], "456": [], "78": [3], "90": [0, 1, 2, 3]}

    def answer(text: str, k: int) -> str:
        return next(digits[::-1] if k in indices else "0" for digits, indices in right.items() if digits in text)

    scripted.answers[student] = answer
    values = evaluate(make_run(eval__n=4, eval__temperature=0.6, eval__top_p=0.9), student, None)
    assert drop_intervals(values) == {
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


def test_unscored_responses_are_excluded_and_counted(make_run: MakeRun, scripted: ScriptedSampling) -> None:
    """A score of 0 would hide the failure of the reward function."""

    class FailingReward:
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
        RewardManager(FailingReward(), run.reward),
        TOKENIZER,
        PROMPTS,
        SAMPLING_PARAMS,
        None,
    )
    expected = {
        "val-core/near/acc/mean@1": 1.0,
        "val-core/far/acc/mean@1": 0.0,
        "val-core/near/acc/mean@4": 1 / 2,
        "val-core/far/acc/mean@4": 2 / 7,
        "val-core/near/acc/best@4/mean": 1.0,  # one prompt has a score
        "val-core/far/acc/best@4/mean": 0.5,
        "val-aux/reward/num_failures": 2 + 7,
    }
    assert drop_intervals(evaluator.evaluate(student, None)) == expected
    assert drop_intervals(evaluator.evaluate(student, None)) == expected  # the count starts at 0 in each evaluation


def test_teacher_responds_with_its_weights_and_context(make_run: MakeRun, scripted: ScriptedSampling) -> None:
    run = make_run(self_distillation__demonstration_source="none", self_distillation__include_environment_feedback=True)
    student = nn.Linear(1, 1)
    teacher = build_teacher(student, run.self_distillation)
    assert teacher.module is not None
    scripted.answers[student] = lambda text, _: "321" if "123" in text else "0"
    scripted.answers[teacher.module] = copy_feedback
    values = evaluate(run, student, teacher)
    assert drop_intervals(values) == {
        "val-core/near/acc/mean@1": 0.5,
        "val-core/far/acc/mean@1": 0.0,
        # The correct response got no feedback, so the teacher has no context for this prompt.
        "val-teacher/near/prompted_fraction": 0.5,
        "val-teacher/far/prompted_fraction": 1.0,
        "val-teacher/near/acc/mean@1": 1.0,
        "val-teacher/far/acc/mean@1": 1.0,
        **NO_FAILURES,
        "val-teacher/near/acc_minus_student/mean@1": 1.0,
        "val-teacher/far/acc_minus_student/mean@1": 1.0,
    }


def test_teacher_minus_student_compares_the_same_prompts(make_run: MakeRun, scripted: ScriptedSampling) -> None:
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
def test_teacher_context_equals_that_of_training(make_run: MakeRun, scripted: ScriptedSampling, source: str) -> None:
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

    scripted.answers |= {student: answer, teacher.module: copy_feedback}
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
    expected = {
        i: next((s.teacher_prompt.token_ids for s in samples if s.prompt is p and s.is_distilled), None)
        for i, p in enumerate(PROMPTS)
    }
    assert contexts == [ids for ids in expected.values() if ids is not None]
    assert len(contexts) == {"none": 4, "successful_rollout": 1, "ground_truth": 4}[source]
    assert (
        values["val-teacher/near/prompted_fraction"]
        == {"none": 1, "successful_rollout": 0.5, "ground_truth": 1}[source]
    )
    assert (
        values["val-teacher/far/prompted_fraction"] == {"none": 1, "successful_rollout": 0, "ground_truth": 1}[source]
    )
    assert ("val-teacher/far/acc/mean@1" in values) == (source != "successful_rollout")


def test_trust_region_teacher_mixes_both_models(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(self_distillation__teacher_regularization="trust-region", self_distillation__ema_update_rate=0.25)
    student = nn.Linear(1, 1)
    teacher = build_teacher(student, run.self_distillation)
    policies = []

    def respond(
        policy: Any, prompts: Sequence[TokenPrompt], sampling_params: SamplingParams, seed: int, vision: Any
    ) -> Any:
        policies.append(list(policy))
        return [[Completion([5], [], True)] * sampling_params.n for _ in prompts]

    monkeypatch.setattr(evaluator, "sample_responses", respond)
    evaluate(run, student, teacher)
    assert policies == [[(student, 1.0)], [(teacher.module, 0.75), (student, 0.25)]]


@pytest.mark.parametrize(
    "settings", [{"eval__evaluate_teacher": False}, {"self_distillation__policy_loss_weight": 1.0}]
)
def test_teacher_is_not_evaluated_if_disabled_or_absent(
    make_run: MakeRun, scripted: ScriptedSampling, settings: dict[str, Any]
) -> None:
    run = make_run(**settings)
    student = nn.Linear(1, 1)
    teacher = build_teacher(student, run.self_distillation) if run.self_distillation.distills else None
    scripted.answers[student] = lambda *_: "0"
    values = evaluate(run, student, teacher)
    assert drop_intervals(values) == {"val-core/near/acc/mean@1": 0.0, "val-core/far/acc/mean@1": 0.0, **NO_FAILURES}


def test_every_evaluation_samples_with_the_same_seed(make_run: MakeRun, make_model: Any) -> None:
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
        SAMPLING_PARAMS,
        None,
    )
    assert evaluator.evaluate(model, None) == evaluator.evaluate(model, None)
