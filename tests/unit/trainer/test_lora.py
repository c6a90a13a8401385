"""A actor whose student has adapters, against the same step written plainly on merged weights."""

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
DECODING = SamplingParams(
    n=3, max_new_tokens=8, temperature=0.8, top_p=1.0, batch_size=4, stop_token_ids=[2], pad_token_id=0
)


def build_student(make_model: MakeModel, run: SDPOConfig, trained: bool = True, **settings: Any) -> Any:
    student = make_model(**settings)
    torch.manual_seed(0)
    add_adapters(student, run.lora)
    if trained:  # with B at zero A would get no gradient
        with torch.no_grad():
            for name, param in student.named_parameters():
                if "lora_B" in name:
                    param.normal_(std=0.2)
    return student


def adapters_of(student: nn.Module) -> Pairs:
    """A and B of each layer, copied, in float64."""
    return {
        name: tuple(getattr(layer, part)["default"].weight.detach().double().clone() for part in ("lora_A", "lora_B"))
        for name, layer in get_adapted_layers(student).items()
    }  # type: ignore[return-value]


def record_gradients(actor: Actor) -> Pairs:
    """Of A and B of each layer, as the optimizer finds them in its last step."""
    found: Pairs = {}

    def before(*_: Any) -> None:
        for name, layer in get_adapted_layers(actor.student).items():
            pair = [getattr(layer, part)["default"].weight.grad for part in ("lora_A", "lora_B")]
            found[name] = (pair[0].clone(), pair[1].clone())

    actor.optimizer.register_step_pre_hook(before)
    return found


def assert_close(actual: Tensor, expected: Tensor, largest: float, name: str) -> None:
    torch.testing.assert_close(
        actual, expected, atol=1e-5 * largest, rtol=1e-4, msg=lambda text: f"{name}: {text}", check_dtype=False
    )


def plain_gradients(
    make_model: MakeModel, teacher: nn.Module, adapters: Pairs, samples: list[TrainingSample], run: SDPOConfig
) -> dict[str, list[Tensor]]:
    """By autograd through W + s B A, one sample after another, each by itself."""
    plain = make_model()
    leaves = {name: [value.float().requires_grad_() for value in pair] for name, pair in adapters.items()}
    weights = {
        f"{name}.weight": plain.get_parameter(f"{name}.weight").detach() + SCALE * b @ a
        for name, (a, b) in leaves.items()
    }

    def log_probs(policy: Callable[[Tensor], Tensor], prompt: Any, sample: TrainingSample) -> Tensor:
        logits = policy(torch.tensor([[*prompt, *sample.response.token_ids]]))[0, len(prompt) - 1 : -1]
        rows = logits.log_softmax(-1)
        return nn.functional.pad(rows, (0, 0, 0, 8 - len(rows)))

    def as_student(ids: Tensor) -> Tensor:
        return functional_call(plain, weights, (), {"input_ids": ids}).logits

    student_rows = torch.stack([log_probs(as_student, s.prompt.token_ids, s) for s in samples])
    with torch.no_grad():
        shown = [s.teacher_prompt.token_ids or s.prompt.token_ids for s in samples]
        as_teacher = lambda ids: teacher(input_ids=ids).logits  # noqa: E731
        teacher_rows = torch.stack([log_probs(as_teacher, p, s) for p, s in zip(shown, samples, strict=True)])
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
def test_gradients_are_those_of_the_plain_step(
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
    before = adapters_of(student)
    actor = build_actor(student, run, 0)
    samples = make_samples()
    assert isinstance(actor.collator.collate(samples[:3]).student, PackedSequences) == packed
    found = record_gradients(actor)
    values = actor.update_policy(samples)
    # The teacher is the base model still, as it began.
    expected = plain_gradients(make_model, make_model(), before, samples, run)
    assert found.keys() == expected.keys() and len(found) == (4 if targets else 14)
    largest = max(float(grad.abs().max()) for pair in expected.values() for grad in pair)
    for name, pair in expected.items():
        for actual, plain in zip(found[name], pair, strict=True):
            assert_close(actual, plain, largest, name)
    norm = torch.stack([grad.norm() for pair in expected.values() for grad in pair]).norm()
    assert values[metrics.GRAD_NORM] == pytest.approx(float(norm), rel=1e-4)
    assert not any(torch.equal(b, before[name][1]) for name, (_, b) in adapters_of(student).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_some_steps_the_teacher_is_the_formula_and_the_base_is_untouched(
    make_model: MakeModel, make_run: MakeRun, make_samples: MakeSamples, dtype: torch.dtype
) -> None:
    rate = 0.05
    run = make_run(**LORA, self_distillation__ema_update_rate=rate, optim__lr=3e-2, actor__mini_batch_size=1)
    student = build_student(make_model, run, trained=False, dtype=dtype)
    start = {name: param.clone() for name, param in MergedParameters(student).items()}
    actor = build_actor(student, run, 0)
    expected = {name: torch.zeros(b.shape[0], a.shape[1]).double() for name, (a, b) in adapters_of(student).items()}
    for seed in range(6):
        actor.update_policy(make_samples(seed=seed))
        for name, (a, b) in adapters_of(student).items():
            expected[name] = (1 - rate) * expected[name] + rate * SCALE * b @ a
    assert actor.teacher is not None and actor.teacher.weights is not None
    for name, value in expected.items():
        assert float(value.abs().max()) > 1e-3
        own = actor.teacher.weights.values[f"{name}.weight"]
        torch.testing.assert_close(own.double(), value, rtol=1e-6, atol=1e-8, msg=lambda text, n=name: f"{n}: {text}")
    for name, param in student.named_parameters():
        if "lora_" not in name:
            assert torch.equal(param, start[name.replace(".base_layer.", ".")]), name


@pytest.mark.slow
def test_another_process_samples_with_the_merged_weights(
    make_model: MakeModel, make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(**LORA)
    student = build_student(make_model, run)
    make_model().save_pretrained(tmp_path)
    build_engine = partial(
        TransformersEngine.from_config, ModelConfig(path=str(tmp_path)), DECODING, torch.device("cpu"), 10**6
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
            expected = sample_responses([(student, 1.0)], PROMPTS, DECODING, 7)
            for many, others in zip(rollouts.responses, expected, strict=True):
                for one, two in zip(many, others, strict=True):
                    assert one.token_ids == two.token_ids
                    assert one.log_probs == pytest.approx(two.log_probs, abs=1e-5)
            assert expected != sample_responses([(make_model(), 1.0)], PROMPTS, DECODING, 7)
    finally:
        sampler.close()


def test_a_copy_in_this_process_samples_with_them_too(make_model: MakeModel, make_run: MakeRun) -> None:
    student, copy = build_student(make_model, make_run(**LORA)), make_model(seed=1)
    sampler = LocalSampler(TransformersEngine(copy, DECODING))
    sampler.load_weights(student, 1)
    for name, param in copy.named_parameters():
        assert torch.equal(param, MergedParameters(student)[name])
    itself = LocalSampler(TransformersEngine(student, DECODING, is_student=True))
    itself.load_weights(student, 1)
    itself.submit(PROMPTS, 7)
    assert itself.collect().responses == sample_responses([(student, 1.0)], PROMPTS, DECODING, 7)


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
    """What nothing in the program catches, as nothing catches SIGKILL."""


@pytest.mark.parametrize(
    ("kind", "max_staleness"),
    [("ema", 0), ("snapshot", 0), ("frozen", 0), pytest.param("ema", 1, marks=pytest.mark.slow)],
)
def test_a_killed_run_goes_on_to_the_same_end(
    make_task_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, max_staleness: int, kind: str
) -> None:
    settings = {**SETTINGS, "max_staleness": max_staleness, "self_distillation__teacher_regularization": kind}
    whole = make_task_run(**settings, output_dir=str(tmp_path / "whole"))
    SDPOTrainer(whole).train()
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
    folders = [Path(each.output_dir) / "checkpoints" / "step_4" for each in (whole, run)]
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


def test_what_a_resumed_run_may_not_change(make_task_run: MakeRun) -> None:
    run = make_task_run(**{**SETTINGS, "max_steps": 1})
    SDPOTrainer(run).train()
    with pytest.raises(SDPOError, match=r"lora\.rank=2: was 4 when the run started"):
        SDPOTrainer(replace(run, max_steps=2, resume_mode="required", lora=replace(run.lora, rank=2))).train()
