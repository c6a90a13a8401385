"""An actor whose student has LoRA adapters, compared with a reference step on merged weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from sdpo import compute_self_distillation_loss
from sdpo.config.model import ModelConfig
from sdpo.config.rollout import RolloutConfig
from sdpo.config.root import SDPOConfig
from sdpo.errors import SDPOError
from sdpo.models.generation.sampling import SamplingParams, sample_responses
from sdpo.models.lora.adapters import MergedParameters, add_adapters, get_adapted_layers
from sdpo.models.multimodal.processor import TokenPrompt
from sdpo.models.packing.layout import PackedSequences
from sdpo.observability import metrics
from sdpo.trainer.actor.actor import Actor
from sdpo.trainer.actor.build import build_actor
from sdpo.trainer.checkpoint.state import FILE
from sdpo.trainer.data.samples import TrainingSample
from sdpo.trainer.rollout.hf_engine import TransformersEngine
from sdpo.trainer.rollout.local import LocalSampler
from sdpo.trainer.rollout.process import ProcessSampler
from sdpo.trainer.trainer import SDPOTrainer

MakeModel = Callable[..., Any]
MakeRun = Callable[..., SDPOConfig]
MakeSamples = Callable[..., list[TrainingSample]]
Pairs = dict[str, tuple[Tensor, Tensor]]  # A and B by layer
LORA = {"lora__rank": 4, "lora__alpha": 6}
SCALE = 6 / 4
PROMPTS = [TokenPrompt(ids) for ids in ([5, 6, 7], [9, 3], [8, 8, 8, 8])]
SAMPLING_PARAMS = SamplingParams(
    n=3, max_new_tokens=8, temperature=0.8, top_p=1.0, batch_size=4, stop_token_ids=[2], pad_token_id=0
)


def build_student(make_model: MakeModel, run: SDPOConfig, trained: bool = True, **settings: Any) -> Any:
    student = make_model(**settings)
    torch.manual_seed(0)
    add_adapters(student, run.lora)
    if trained:  # with B = 0, A would get no gradient
        with torch.no_grad():
            for name, param in student.named_parameters():
                if "lora_B" in name:
                    param.normal_(std=0.2)
    return student


def copy_adapters(student: nn.Module) -> Pairs:
    """Copies of A and B of each layer in float64."""
    return {
        name: tuple(getattr(layer, part)["default"].weight.detach().double().clone() for part in ("lora_A", "lora_B"))
        for name, layer in get_adapted_layers(student).items()
    }  # type: ignore[return-value]


def record_gradients(actor: Actor) -> Pairs:
    """Record the gradients of A and B of each layer before an optimizer step."""
    gradients: Pairs = {}

    def before(*_: Any) -> None:
        for name, layer in get_adapted_layers(actor.student).items():
            pair = [getattr(layer, part)["default"].weight.grad for part in ("lora_A", "lora_B")]
            gradients[name] = (pair[0].clone(), pair[1].clone())

    actor.optimizer.register_step_pre_hook(before)
    return gradients


def assert_close(actual: Tensor, expected: Tensor, largest: float, name: str) -> None:
    torch.testing.assert_close(
        actual, expected, atol=1e-5 * largest, rtol=1e-4, msg=lambda text: f"{name}: {text}", check_dtype=False
    )


def reference_gradients(
    make_model: MakeModel, teacher: nn.Module, adapters: Pairs, samples: list[TrainingSample], run: SDPOConfig
) -> dict[str, list[Tensor]]:
    """Compute gradients by autograd through W + s B A, one sample per forward pass."""
    reference = make_model()
    leaves = {name: [value.float().requires_grad_() for value in pair] for name, pair in adapters.items()}
    weights = {
        f"{name}.weight": reference.get_parameter(f"{name}.weight").detach() + SCALE * b @ a
        for name, (a, b) in leaves.items()
    }

    def log_probs(policy: Callable[[Tensor], Tensor], prompt: Any, sample: TrainingSample) -> Tensor:
        logits = policy(torch.tensor([[*prompt, *sample.response.token_ids]]))[0, len(prompt) - 1 : -1]
        rows = logits.log_softmax(-1)
        return nn.functional.pad(rows, (0, 0, 0, 8 - len(rows)))

    def compute_student(ids: Tensor) -> Tensor:
        return functional_call(reference, weights, (), {"input_ids": ids}).logits

    student_rows = torch.stack([log_probs(compute_student, s.prompt.token_ids, s) for s in samples])
    with torch.no_grad():
        teacher_prompts = [s.teacher_prompt.token_ids or s.prompt.token_ids for s in samples]
        compute_teacher = lambda ids: teacher(input_ids=ids).logits  # noqa: E731
        teacher_rows = torch.stack(
            [log_probs(compute_teacher, p, s) for p, s in zip(teacher_prompts, samples, strict=True)]
        )
    ids = torch.stack([torch.tensor(s.response.token_ids + [0] * (8 - len(s.response.token_ids))) for s in samples])
    mask = torch.stack([(torch.arange(8) < len(s.response.token_ids)).float() for s in samples])
    rollout = torch.stack(
        [torch.tensor(s.response.log_probs + [0.0] * (8 - len(s.response.log_probs))) for s in samples]
    )
    new = student_rows.gather(-1, ids[..., None])[..., 0]
    ratio = (new.detach() - rollout).exp().clamp(max=run.rollout_correction.rollout_is_threshold)
    loss, _ = compute_self_distillation_loss(
        new,
        teacher_rows.gather(-1, ids[..., None])[..., 0],
        mask,
        run.self_distillation,
        old_log_probs=new.detach(),
        student_all_log_probs=student_rows,
        teacher_all_log_probs=teacher_rows,
        self_distillation_mask=torch.tensor([float(s.is_distilled) for s in samples]),
        rollout_is_weights=ratio * torch.tensor([s.distillation_weight for s in samples])[:, None],
    )
    loss.backward()
    return {name: [leaf.grad for leaf in pair] for name, pair in leaves.items()}


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", [[], ["q_proj", "down_proj"]], ids=["all", "some"])
def test_gradients_match_the_reference_step(
    make_model: MakeModel,
    make_run: MakeRun,
    make_samples: MakeSamples,
    packed: bool,
    checkpointing: bool,
    targets: list[str],
) -> None:
    run = make_run(
        **LORA,
        lora__target_modules=targets,
        actor__max_tokens_per_micro_batch=60,
        actor__gradient_checkpointing=checkpointing,
        optim__max_grad_norm=1e6,
    )
    student = build_student(make_model, run, attn_implementation="sdpa" if packed else "eager")
    before = copy_adapters(student)
    actor = build_actor(student, run, 0)
    samples = make_samples()
    assert isinstance(actor.collator.collate(samples[:3]).student, PackedSequences) == packed
    gradients = record_gradients(actor)
    values = actor.update_policy(samples)
    # The teacher still equals the base model.
    expected = reference_gradients(make_model, make_model(), before, samples, run)
    assert gradients.keys() == expected.keys() and len(gradients) == (4 if targets else 14)
    largest = max(float(grad.abs().max()) for pair in expected.values() for grad in pair)
    for name, pair in expected.items():
        for actual, reference in zip(gradients[name], pair, strict=True):
            assert_close(actual, reference, largest, name)
    norm = torch.stack([grad.norm() for pair in expected.values() for grad in pair]).norm()
    assert values[metrics.GRAD_NORM] == pytest.approx(float(norm), rel=1e-4)
    assert not any(torch.equal(b, before[name][1]) for name, (_, b) in copy_adapters(student).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_teacher_follows_the_ema_formula_and_base_weights_do_not_change(
    make_model: MakeModel, make_run: MakeRun, make_samples: MakeSamples, dtype: torch.dtype
) -> None:
    rate = 0.05
    run = make_run(**LORA, self_distillation__ema_update_rate=rate, optim__lr=3e-2, actor__mini_batch_size=1)
    student = build_student(make_model, run, trained=False, dtype=dtype)
    start = {name: param.clone() for name, param in MergedParameters(student).items()}
    actor = build_actor(student, run, 0)
    expected = {name: torch.zeros(b.shape[0], a.shape[1]).double() for name, (a, b) in copy_adapters(student).items()}
    for seed in range(6):
        actor.update_policy(make_samples(seed=seed))
        for name, (a, b) in copy_adapters(student).items():
            expected[name] = (1 - rate) * expected[name] + rate * SCALE * b @ a
    assert actor.teacher is not None and actor.teacher.weights is not None
    for name, value in expected.items():
        assert float(value.abs().max()) > 1e-3
        actual = actor.teacher.weights.values[f"{name}.weight"]
        torch.testing.assert_close(
            actual.double(), value, rtol=1e-6, atol=1e-8, msg=lambda text, n=name: f"{n}: {text}"
        )
    for name, param in student.named_parameters():
        if "lora_" not in name:
            assert torch.equal(param, start[name.replace(".base_layer.", ".")]), name


@pytest.mark.slow
def test_sampler_process_uses_the_merged_weights(make_model: MakeModel, make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(**LORA)
    student = build_student(make_model, run)
    make_model().save_pretrained(tmp_path)
    build_engine = partial(
        TransformersEngine.from_config,
        RolloutConfig(),
        ModelConfig(path=str(tmp_path)),
        SAMPLING_PARAMS,
        torch.device("cpu"),
        max_length=100,
        max_pixels=10**6,
    )
    sampler = ProcessSampler(student, build_engine, 1)
    try:
        for version in range(2):
            if version:
                with torch.no_grad():
                    for name, param in student.named_parameters():
                        if "lora_" in name:
                            param.mul_(1.5)
                sampler.load_weights(student, version)
            sampler.submit(PROMPTS, 7)
            rollouts = sampler.collect()
            assert rollouts is not None and rollouts.policy_version == version
            expected = sample_responses([(student, 1.0)], PROMPTS, SAMPLING_PARAMS, 7)
            for responses, others in zip(rollouts.responses, expected, strict=True):
                for one, two in zip(responses, others, strict=True):
                    assert one.token_ids == two.token_ids
                    assert one.log_probs == pytest.approx(two.log_probs, abs=1e-5)
            assert expected != sample_responses([(make_model(), 1.0)], PROMPTS, SAMPLING_PARAMS, 7)
    finally:
        sampler.close()


def test_local_sampler_uses_the_merged_weights(make_model: MakeModel, make_run: MakeRun) -> None:
    student, copy = build_student(make_model, make_run(**LORA)), make_model(seed=1)
    sampler = LocalSampler(TransformersEngine(copy, SAMPLING_PARAMS))
    sampler.load_weights(student, 1)
    for name, param in copy.named_parameters():
        assert torch.equal(param, MergedParameters(student)[name])
    of_student = LocalSampler(TransformersEngine(student, SAMPLING_PARAMS, is_student=True))
    of_student.load_weights(student, 1)
    of_student.submit(PROMPTS, 7)
    assert of_student.collect().responses == sample_responses([(student, 1.0)], PROMPTS, SAMPLING_PARAMS, 7)


SETTINGS: dict[str, Any] = {
    **LORA,
    "max_steps": 4,
    "save_steps": 1,
    "eval_steps": 2,
    "optim__lr": 1e-2,
    "actor__mini_batch_size": 2,
    "self_distillation__ema_update_rate": 0.3,
    "self_distillation__teacher_sync_steps": 2,
}


class Killed(BaseException):
    """An exception that the program does not catch; it replaces SIGKILL."""


@pytest.mark.parametrize(
    ("kind", "max_staleness"),
    [("ema", 0), ("snapshot", 0), ("frozen", 0), pytest.param("ema", 1, marks=pytest.mark.slow)],
)
def test_killed_run_resumes_to_the_same_result(
    make_task_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, max_staleness: int, kind: str
) -> None:
    settings = {**SETTINGS, "max_staleness": max_staleness, "self_distillation__teacher_regularization": kind}
    uninterrupted = make_task_run(**settings, output_dir=str(tmp_path / "uninterrupted"))
    SDPOTrainer(uninterrupted).train()
    run = make_task_run(**settings, output_dir=str(tmp_path / "killed"))
    update = Actor._update

    def kill(actor: Actor) -> Any:
        if actor.version == 2:
            raise Killed
        return update(actor)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Actor, "_update", kill)
        SDPOTrainer(run).train()
    SDPOTrainer(replace(run, resume_mode="required")).train()
    folders = [Path(each.output_dir) / "checkpoints" / "step_4" for each in (uninterrupted, run)]
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    states = [torch.load(folder / FILE)["actor"] for folder in folders]
    weights = [state["teacher"]["weights"] for state in states]
    assert (weights[0] is None) == (kind == "frozen")
    for name in weights[0] or {}:
        assert torch.equal(weights[0][name], weights[1][name]) and weights[0][name].any()
    for number, moments in states[0]["moments"].items():
        assert all(torch.equal(value, states[1]["moments"][number][name]) for name, value in moments.items())
    assert not (folders[0] / "teacher").exists() and not (folders[0] / "model.safetensors").exists()


def test_resume_with_another_rank_is_refused(make_task_run: MakeRun) -> None:
    run = make_task_run(**{**SETTINGS, "max_steps": 1})
    SDPOTrainer(run).train()
    with pytest.raises(SDPOError, match=r"lora\.rank=2: was 4 when the run started"):
        SDPOTrainer(replace(run, max_steps=2, resume_mode="required", lora=replace(run.lora, rank=2))).train()
