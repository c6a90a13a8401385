"""Prompts with images on verl's engine: log-probabilities, a complete step, passes of the vision tower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from vision_language import LoadedModel, load_vision_model, make_messages, plain_logits

from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.models.generation.sampling import Completion
from sdpo.models.lora.adapters import add_adapters
from sdpo.models.multimodal.vision_tower import freeze_vision_tower
from sdpo.observability import metrics
from sdpo.prompting.demonstrations import PrivilegedContext, ScoredRollout
from sdpo.prompting.teacher_context import TeacherContext
from sdpo.prompting.tokenization import TeacherPrompt, encode_teacher_prompt
from sdpo.rewards.base import Row
from sdpo.trainer.actor.build import build_actor
from sdpo.trainer.data.prompts import Prompt
from sdpo.trainer.data.samples import TrainingSample

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
NUM_IMAGES = (1, 0, 3, 1)  # of the prompts
N = 2
UNDISTILLED = (1, 6, 7)  # on two ranks, the second has a micro-batch with images and without a distilled sample
TEXTS = ("how long is it?", "how long?", "which of these?", "how wide is it?")


def make_samples(loaded: LoadedModel) -> list[TrainingSample]:
    generator = torch.Generator().manual_seed(0)
    samples = []
    for i in range(len(NUM_IMAGES) * N):
        messages = make_messages(NUM_IMAGES[i // N], TEXTS[i // N])
        length = 2 + i % 4
        ids = torch.randint(7, 200, (length,), generator=generator).tolist()
        shown = PrivilegedContext(solution="it is 12 long"[: 5 + i])
        teacher = encode_teacher_prompt(loaded.reader, messages, shown, SelfDistillationConfig())
        samples.append(
            TrainingSample(
                prompt=Prompt(Row("tiny", messages, {}), list(loaded.encode(messages).token_ids)),
                response=Completion(ids, (-5 * torch.rand(length, generator=generator)).tolist(), finished=False),
                rollout=ScoredRollout(i, "", 0.0),
                context=TeacherContext(shown, TeacherPrompt(None, [], False) if i in UNDISTILLED else teacher),
                advantage=float(torch.randn(1, generator=generator)),
                distillation_weight=1.0,
            )
        )
    return samples


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def samples(family: str, vision_dir: Callable[[str], Path]) -> list[TrainingSample]:
    return make_samples(load_vision_model(vision_dir(family)))


@pytest.fixture(scope="module")
def native(
    family: str, vision_dir: Callable[[str], Path], samples: list[TrainingSample], make_run_in: Callable[..., Any]
) -> dict[str, Any]:
    """Run a step on the native trainer, with the old log-probabilities that verl's trainer would send."""
    results = {}
    ways = {"whole": {}, "frozen": {"actor__freeze_vision_tower": True}, "LoRA": {"lora__rank": 4}}
    for name, settings in ways.items():
        loaded = load_vision_model(vision_dir(family))
        run = make_run_in(
            data__train_batch_size=len(NUM_IMAGES),
            rollout__n=N,
            optim__lr=1e-3,
            self_distillation__alpha=0.5,
            self_distillation__policy_loss_weight=0.3,
            **settings,
        )
        if name == "frozen":
            freeze_vision_tower(loaded.model)
        if name == "LoRA":
            add_adapters(loaded.model, run.lora)
            generator = torch.Generator().manual_seed(1)
            for param in get_adapters(loaded.model).values():
                param.data = 0.1 * torch.randn(param.shape, generator=generator)
        initial = {weight: param.detach().clone() for weight, param in get_adapters(loaded.model).items()}
        actor = build_actor(loaded.model, run, pad_token_id=0, vision=loaded.vision)
        old = actor.compute_log_probs(samples)
        values = actor.update_policy(samples)
        results[name] = {"run": run, "old": old, "metrics": values, "actor": actor, "adapters": initial}
    return results


def get_adapters(model: Any) -> dict[str, Any]:
    return {name: param for name, param in model.named_parameters() if "lora_" in name}


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def on_verl(
    request: pytest.FixtureRequest,
    family: str,
    vision_dir: Callable[[str], Path],
    samples: list[TrainingSample],
    native: dict[str, Any],
    train_on_verl: Callable[..., dict[str, Any]],
    pad_for_verl: Callable[..., dict[str, torch.Tensor]],
) -> dict[str, Any]:
    loaded = load_vision_model(vision_dir(family))
    run, old = native["whole"]["run"], native["whole"]["old"]
    whole = {
        "model": str(vision_dir(family)),
        "settings": asdict(run.self_distillation),
        "batches": [pad_for_verl(samples, old, 2.0, loaded.vision)],
        "lr": run.optim.lr,
        "temperature": 1.0,
        "mini_batch_size": len(samples),
        "loss_agg_mode": "token-mean",
        "horizon": run.rollout.max_response_length,
        "use_remove_padding": False,
        "max_tokens": None,
        "micro_batch_size": 4,
        "engine": {},
        "record": True,
    }
    alone = [i for i in range(len(samples)) if NUM_IMAGES[i // N]]  # verl's own forward pass crashes on text alone
    with_images = pad_for_verl([samples[i] for i in alone[:4]], [old[i] for i in alone[:4]], 2.0, loaded.vision)
    shared = {**whole, "batches": [with_images], "mini_batch_size": 4, "micro_batch_size": 4 // request.param}
    cases = {
        "whole": whole,
        "frozen": {**whole, "freeze_vision_tower": True},
        "LoRA": {
            **whole,
            "lora": {"lora_rank": 4, "lora_alpha": 8, "lora": {"merge": True}},
            "adapters": native["LoRA"]["adapters"],
            "batches": [pad_for_verl(samples, native["LoRA"]["old"], 2.0, loaded.vision)],
        },
        "token budget": {**whole, "max_tokens": 200, "record": False},
        "gradient checkpointing": {**whole, "gradient_checkpointing": True},
        "shared": shared,
        "each": {**shared, "share_images": False},
        "packed": {**whole, "use_remove_padding": True},
        "packed, eager attention": {**whole, "use_remove_padding": True, "attn_implementation": "eager"},
        "packed, micro-batches of 1": {
            **whole,
            "use_remove_padding": True,
            "max_tokens": None,
            "micro_batch_size": 1,
        },
    }
    if request.param == 1:
        broken = pad_for_verl(samples, old, 2.0, loaded.vision)
        images = broken["multi_modal_inputs"]
        images[4] = {**images[4], "pixel_values": torch.full_like(images[4]["pixel_values"], torch.nan)}
        cases["NaN pixels"] = {**whole, "batches": [broken]}
        kept = [i for i in range(len(samples)) if i != 4]
        others = pad_for_verl([samples[i] for i in kept], [old[i] for i in kept], 2.0, loaded.vision)
        cases["without the fifth"] = {**whole, "batches": [others], "mini_batch_size": 7, "micro_batch_size": 7}
    return {**train_on_verl(cases, request.param), "num_ranks": request.param}


@pytest.mark.slow
def test_log_probs_match_a_plain_forward_pass_per_sample(
    family: str, vision_dir: Callable[[str], Path], samples: list[TrainingSample], on_verl: dict[str, Any]
) -> None:
    loaded = load_vision_model(vision_dir(family))
    student, teacher = [], []
    for sample in samples:
        ids = torch.tensor(sample.response.token_ids)
        for is_teacher, into in ((False, student), (True, teacher)):
            messages = sample.teacher_prompt.messages if is_teacher else sample.prompt.row.prompt
            if is_teacher and not sample.is_distilled:
                continue
            logits = plain_logits(loaded.model, loaded.reader, messages, sample.response.token_ids)
            logits[..., loaded.vision.placeholder_ids] = -torch.inf  # never sampled
            into.append(logits.log_softmax(-1).gather(1, ids[:, None])[:, 0])
    recorded = on_verl["whole"]["log_probs"]
    assert recorded["ids"].tolist() == [token for sample in samples for token in sample.response.token_ids]
    torch.testing.assert_close(recorded["student"], torch.cat(student), rtol=0, atol=1e-4)
    torch.testing.assert_close(recorded["teacher"], torch.cat(teacher), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "whole",
        "frozen",
        "LoRA",
        "token budget",
        "gradient checkpointing",
        "packed",
        "packed, eager attention",
        "packed, micro-batches of 1",
    ],
)
def test_both_backends_take_the_same_step_with_images(
    name: str, on_verl: dict[str, Any], native: dict[str, Any], assert_same_after_adamw: Callable[..., None]
) -> None:
    theirs, ours = on_verl[name], native[name if name in native else "whole"]
    values = theirs["metrics"][0]
    for metric, verl_metric in ((metrics.LOSS, "loss"), (metrics.GRAD_NORM, "grad_norm")):
        assert values[verl_metric][0] == pytest.approx(ours["metrics"][metric], rel=1e-4), metric
    for metric in ours["metrics"].keys() & values.keys() - {metrics.LR}:
        assert values[metric][0] == pytest.approx(ours["metrics"][metric], rel=1e-4, abs=1e-6), metric
    actor = ours["actor"]
    teacher = actor.teacher.weights.values if name == "LoRA" else actor.teacher.module.state_dict()
    for weights, expected in ((theirs["students"][0], actor.student.state_dict()), (theirs["teacher"], teacher)):
        assert weights.keys() == expected.keys()
        for weight, value in expected.items():
            assert_same_after_adamw(weights[weight], value, rtol=1e-4, atol=1e-5, lr=1e-3, msg=weight)


@pytest.mark.slow
def test_sample_with_nonfinite_pixels_is_dropped(
    on_verl: dict[str, Any], assert_same_after_adamw: Callable[..., None]
) -> None:
    """NaN arises in the forward passes of student and teacher, and the other rows of the micro-batch are kept."""
    if on_verl["num_ranks"] != 1:
        pytest.skip("runs on one rank")
    broken, expected = on_verl["NaN pixels"], on_verl["without the fifth"]
    assert broken["metrics"][0][metrics.NONFINITE_SAMPLES] == [1.0]
    assert broken["metrics"][0][metrics.SKIPPED_UPDATES] == [0.0]
    for metric in ("loss", "grad_norm", metrics.DISTILLATION_LOSS):
        assert broken["metrics"][0][metric][0] == pytest.approx(expected["metrics"][0][metric][0], rel=1e-4), metric
    for weight, value in expected["students"][0].items():
        ours = broken["students"][0][weight]
        assert_same_after_adamw(ours, value, rtol=1e-4, atol=1e-5, lr=1e-3, msg=weight)


@pytest.mark.slow
def test_frozen_vision_tower_is_unchanged_and_the_language_model_trains(on_verl: dict[str, Any]) -> None:
    before, after = on_verl["frozen"]["teacher_before"], on_verl["frozen"]["students"][0]
    for name, value in before.items():
        frozen = name.startswith("model.visual.")
        assert torch.equal(after[name], value) == frozen, name
    learned = on_verl["whole"]["students"][0]
    assert not any(torch.equal(learned[name], value) for name, value in before.items() if "visual.merger" in name)


@pytest.mark.slow
def test_vision_tower_reads_each_image_once_per_micro_batch(on_verl: dict[str, Any]) -> None:
    shared, each = on_verl["shared"], on_verl["each"]
    assert shared["metrics"][0]["loss"] == pytest.approx(each["metrics"][0]["loss"], rel=1e-5)
    assert shared["metrics"][0]["grad_norm"] == pytest.approx(each["metrics"][0]["grad_norm"], rel=1e-5)
    for part in ("student", "teacher"):
        torch.testing.assert_close(shared["log_probs"][part], each["log_probs"][part], rtol=0, atol=1e-5)
    # Prompts of 16, and of 16 + 24 + 32 patches, two rollouts of each; on two ranks, each rank has one of the prompts.
    assert (each["num_patches"], shared["num_patches"]) == ((176, 72) if on_verl["num_ranks"] == 1 else (32, 16))
