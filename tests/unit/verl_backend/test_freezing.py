"""A teacher that a health action freezes on verl's engine, on two ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from sdpo.rewards.toy.hidden_rule import build_tokenizer
from sdpo.trainer.data.samples import TrainingSample

pytestmark = pytest.mark.slow

Weights = dict[str, torch.Tensor]
LORA = {"lora_rank": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "lora": {"merge": True}}


def same(one: Weights, other: Weights) -> bool:
    assert one.keys() == other.keys() and one
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def results(
    make_model: Callable[..., PreTrainedModel],
    make_samples: Callable[..., list[TrainingSample]],
    pad_for_verl: Callable[..., dict[str, torch.Tensor]],
    train_on_verl: Callable[..., dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("freezing")
    make_model().save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    samples = make_samples(8, seed=5, undistilled=(2,))
    batch = pad_for_verl(samples, [torch.tensor(sample.response.log_probs) for sample in samples], 2.0)
    base = {
        "model": str(folder / "model"),
        "batches": [batch] * 3,
        "lr": 1e-3,
        "temperature": 1.0,
        "mini_batch_size": 8,
        "loss_agg_mode": "token-mean",
        "horizon": 8,
        "use_remove_padding": True,
        "max_tokens": 60,
        "micro_batch_size": 2,
        "engine": {},
    }

    def case(kind: str, **more: Any) -> dict[str, Any]:
        return {**base, "settings": {"alpha": 0.5, "teacher_regularization": kind, "ema_update_rate": 0.2}, **more}

    freeze, keep = ["freeze_teacher"], ["snapshot_best"]
    cases = {
        "ema": case("ema"),
        "ema, frozen": case("ema", actions={1: freeze}, checkpoint=str(folder / "ema")),
        "live": case("live"),
        "live, frozen": case("live", actions={1: keep, 2: freeze}, checkpoint=str(folder / "live")),
        "live, offloaded": case(
            "live", actions={1: keep, 2: freeze}, engine={"param_offload": True, "optimizer_offload": True}
        ),
        "live, frozen after loading": case(
            "live", actions={1: keep}, checkpoint=str(folder / "later"), actions_after_loading=freeze
        ),
        "live, frozen before step 1": case("live", actions={0: freeze}),
        "trust region, frozen before step 1": case("trust-region", actions={0: freeze}),
        "frozen": case("frozen"),
        "LoRA, live, frozen before step 1": case("live", lora=LORA, actions={0: freeze}),
        "LoRA, frozen": case("frozen", lora=LORA),
        "LoRA, ema, frozen": case("ema", lora=LORA, actions={1: freeze}, checkpoint=str(folder / "lora_ema")),
        "LoRA, live, frozen": case("live", lora=LORA, actions={1: keep, 2: freeze}, checkpoint=str(folder / "lora")),
    }
    return train_on_verl(cases, 2)


def test_frozen_ema_teacher_does_not_change(results: dict[str, Any]) -> None:
    free, frozen = results["ema"], results["ema, frozen"]
    assert same(frozen["teachers"][0], free["teachers"][0]), "frozen after the first step"
    assert not same(free["teachers"][1], free["teachers"][0])
    assert same(frozen["teachers"][1], frozen["teachers"][0]) and same(frozen["teachers"][2], frozen["teachers"][0])
    assert not same(frozen["students"][2], frozen["students"][1])


def test_freezing_a_live_teacher_restores_reference_model_and_best_student(results: dict[str, Any]) -> None:
    free, frozen = results["live"], results["live, frozen"]
    assert same(frozen["students"][0], free["students"][0])
    assert same(frozen["students"][1], frozen["students"][0]), "gone back"
    assert not same(free["students"][1], free["students"][0])
    initial = results["frozen"]["teacher_before"]
    assert frozen["teachers"][0] == {} and same(frozen["teachers"][1], initial) and same(frozen["teacher"], initial)
    assert not same(frozen["students"][2], frozen["students"][1])


def test_offloading_does_not_change_the_student(results: dict[str, Any]) -> None:
    for ours, plain in zip(results["live, offloaded"]["students"], results["live, frozen"]["students"], strict=True):
        assert same(ours, plain)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("live, frozen before step 1", "frozen"),
        ("trust region, frozen before step 1", "frozen"),
        ("LoRA, live, frozen before step 1", "LoRA, frozen"),
    ],
)
def test_teacher_frozen_before_step_1_equals_a_frozen_teacher(name: str, other: str, results: dict[str, Any]) -> None:
    """Students and the last loss are equal, bit for bit."""
    for ours, plain in zip(results[name]["students"], results[other]["students"], strict=True):
        assert same(ours, plain)
    assert results[name]["metrics"][-1]["loss"] == results[other]["metrics"][-1]["loss"]


def test_freezing_restores_best_adapters_and_keeps_teacher_deltas(results: dict[str, Any]) -> None:
    live, ema = results["LoRA, live, frozen"], results["LoRA, ema, frozen"]
    assert same(live["students"][1], live["students"][0]) and not same(live["students"][2], live["students"][1])
    assert same(ema["teachers"][1], ema["teachers"][0]) and same(ema["teachers"][2], ema["teachers"][0])
    for result in (live, ema):
        went_on, loaded = result["continued"]
        assert same(loaded, went_on)
    assert same(ema["loaded_teacher"], ema["teacher"])


@pytest.mark.parametrize("name", ["ema, frozen", "live, frozen", "live, frozen after loading"])
def test_resumed_run_has_the_same_frozen_teacher(name: str, results: dict[str, Any]) -> None:
    went_on, loaded = results[name]["continued"]
    assert same(loaded, went_on)
    teacher = {key.removeprefix("teacher."): value for key, value in went_on.items() if key.startswith("teacher.")}
    expected = results[name]["teacher"] or results["frozen"]["teacher_before"]
    assert same(teacher, expected)
    if name != "live, frozen after loading":
        assert same(results[name]["loaded_teacher"], expected)


def test_checkpoint_has_files_of_every_rank(results: dict[str, Any], tmp_path_factory: Any) -> None:
    folder = Path(tmp_path_factory.getbasetemp())
    (later,) = folder.glob("freezing[0-9]*/later/teacher")
    names = {path.name for path in later.iterdir()}
    assert names == {
        "teacher.json",
        *(f"{content}_world_size_2_rank_{rank}.pt" for content in ("best", "state") for rank in range(2)),
    }
