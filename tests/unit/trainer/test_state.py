"""Checkpoints load with transformers and have everything that a resumed run needs."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo.config.root import SDPOConfig
from sdpo.errors import SDPOError
from sdpo.models.generation.sampling import Completion
from sdpo.rewards.base import Row
from sdpo.rewards.toy.hidden_rule import build_tokenizer
from sdpo.trainer.actor.build import build_actor
from sdpo.trainer.checkpoint.state import (
    FILE,
    TrainingState,
    compute_fingerprints,
    get_random_states,
    save_models,
    set_random_states,
)
from sdpo.trainer.data.prompts import Prompt
from sdpo.trainer.data.samples import TrainingSample
from sdpo.trainer.rollout.base import RolloutBatch

MakeModel = Callable[..., Any]
MakeRun = Callable[..., SDPOConfig]
MakeSamples = Callable[..., list[TrainingSample]]
TOKENIZER = build_tokenizer()
IDS = torch.tensor([[5, 6, 7, 8, 3]])


def assert_same_model(folder: Path, model: torch.nn.Module, dtype: torch.dtype) -> None:
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert loaded.dtype == dtype
        for (name, param), expected in zip(loaded.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(param, expected), name
        if dtype == torch.float32:
            torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ema", "trust-region", "frozen", "snapshot"])
def test_transformers_loads_student_teacher_and_tokenizer(
    make_model: MakeModel, make_run: MakeRun, make_samples: MakeSamples, tmp_path: Path, dtype: torch.dtype, kind: str
) -> None:
    config = make_run(
        self_distillation__teacher_regularization=kind,
        self_distillation__ema_update_rate=0.5,
        optim__lr=0.1,
    )
    actor = build_actor(make_model(dtype=dtype), config, 0)
    for _ in range(2):
        actor.update_policy(make_samples())
    save_models(tmp_path, actor, TOKENIZER)
    assert actor.teacher is not None and actor.teacher.module is not None
    assert_same_model(tmp_path, actor.student.eval(), dtype)
    assert_same_model(tmp_path / "teacher", actor.teacher.module, dtype)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "123"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == TOKENIZER.apply_chat_template(
        messages, tokenize=False
    )
    with torch.no_grad():
        difference = (actor.student(IDS).logits - actor.teacher.module(IDS).logits).abs().max()
    assert difference > 1e-2, "the test needs a teacher that differs from the student"


@pytest.mark.parametrize("settings", [{"teacher_regularization": "live"}, {"policy_loss_weight": 1.0}])
def test_no_teacher_is_saved_without_a_teacher_model(
    model: Any, make_run: MakeRun, tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = make_run(**{f"self_distillation__{name}": value for name, value in settings.items()})
    save_models(tmp_path, build_actor(model, config, 0), TOKENIZER)
    assert not (tmp_path / "teacher").exists()


def test_loaded_state_equals_the_saved_state(
    model: Any, make_run: MakeRun, make_samples: MakeSamples, tmp_path: Path
) -> None:
    actor = build_actor(model, make_run(), 0)
    actor.update_policy(make_samples())
    rollouts = RolloutBatch([[Completion([5, 2], [-0.1, -0.3], True)], [Completion([7], [-2.5], False)]], 4, 0.25)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    saved = TrainingState(actor.state_dict(), {"monitor": {}}, {"a": 0.1}, False, rollouts, "rows")
    saved.save(tmp_path)
    drawn = random.random(), np.random.rand(), torch.rand(1)

    loaded = TrainingState.load(tmp_path)
    assert (loaded.row, loaded.health_checked, loaded.rollouts, loaded.data) == ({"a": 0.1}, False, rollouts, "rows")
    set_random_states(loaded.random)
    assert (random.random(), np.random.rand(), torch.rand(1)) == drawn
    assert loaded.actor.keys() == saved.actor.keys()
    for number, moments in saved.actor["moments"].items():
        assert all(torch.equal(loaded.actor["moments"][number][name], value) for name, value in moments.items())


def test_state_of_another_version_is_refused(tmp_path: Path) -> None:
    torch.save({"actor": {}}, tmp_path / FILE)
    with pytest.raises(SDPOError, match=r"training_state\.pt: cannot be read by this version \(KeyError\)"):
        TrainingState.load(tmp_path)


ROWS = "the rows of data.train_files"
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "token ids": ({"token_ids": [1, 3]}, ROWS),
    "answer": ({"reward_model": {"ground_truth": "2"}}, ROWS),
    "another field of the answer": (
        {"reward_model": {"ground_truth": "1", "style": "x"}},
        "the rows of data.train_files",
    ),
    "test cases": ({"extra_info": {"tests": [1, 2]}}, ROWS),
    "source": ({"data_source": "y"}, ROWS),
    "ability": ({"ability": "math"}, ROWS),
    "solution": ({"solution": "worked"}, ROWS),
    "image": ({"image": b"another"}, "the images of data.train_files"),
    "reward function": ({"code": "def compute_score(row, response): return 1"}, "the reward function in data.task"),
    "base weights": ({"weight": 1.0 + 2**-20}, "the weights in model.path"),
}


def test_each_change_has_another_fingerprint_under_its_name(tmp_path: Path) -> None:
    def compute(**changes: Any) -> dict[str, str]:
        values: dict[str, Any] = {
            "token_ids": [1, 2],
            "reward_model": {"ground_truth": "1"},
            "extra_info": {"tests": [1]},
            "data_source": "x",
            "ability": "",
            "solution": "1",
            "image": b"image",
            "code": "",
            "weight": 1.0,
            **changes,
        }
        messages = [{"role": "user", "content": [{"type": "image", "image": values["image"]}]}]
        row = Row(
            values["data_source"],
            messages,
            values["reward_model"],
            ability=values["ability"],
            extra_info=values["extra_info"],
        )
        (tmp_path / "task.py").write_text(values["code"])
        base = torch.nn.Linear(3, 2).requires_grad_(False)
        torch.nn.init.constant_(base.weight, 0.5)[1, 2] = values["weight"]
        torch.nn.init.zeros_(base.bias)
        prompts = [Prompt(row, values["token_ids"], values["solution"]), Prompt(Row("x", [], {}), [3])]
        return compute_fingerprints(prompts, str(tmp_path / "task.py"), base)

    expected = compute()
    assert compute() == expected and len(expected) == 4
    for name, (changes, cause) in CHANGES.items():
        found = compute(**changes)
        assert [key for key in expected if found[key] != expected[key]] == [cause], name


def test_order_and_borders_of_prompts_are_in_the_fingerprint() -> None:
    def compute(*token_ids: list[int]) -> dict[str, str]:
        return compute_fingerprints([Prompt(Row("", [], {}), ids) for ids in token_ids], "geo3k", None)

    found = [compute([1, 2], [3]), compute([1], [2, 3]), compute([3], [1, 2]), compute([1, 2])]
    assert len({each[ROWS] for each in found}) == 4


def test_restored_generators_repeat_their_numbers() -> None:
    states = get_random_states()
    first = [torch.rand(2), np.random.rand(2), random.gauss(0, 1)]
    set_random_states(states)
    again = [torch.rand(2), np.random.rand(2), random.gauss(0, 1)]
    assert torch.equal(first[0], again[0]) and (first[1] == again[1]).all() and first[2] == again[2]
