"""Bugs of verl 0.9.1, reproduced, and their workarounds; tests/verl has the bugs that need a complete run."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from transformers import PreTrainedModel
from verl.experimental.one_step_off_policy.ray_trainer import OneStepOffRayTrainer
from verl.models.transformers import monkey_patch
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager
from verl.utils.import_utils import is_trl_available
from verl.workers.utils.padding import left_right_2_no_padding

from sdpo.observability import metrics
from sdpo.verl_backend.compat.workarounds import FlushIgnoringLogger, repair_position_ids, skip_trl_value_head
from sdpo.verl_backend.driver import v1_trainers
from sdpo.verl_backend.driver.health import RunHealth
from sdpo.verl_backend.driver.one_step_off_trainer import SelfDistillationOneStepOffTrainer
from sdpo.verl_backend.worker import engine


class BrokenLoader:
    """Two batches, then an unreadable row."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield {}
        yield {}
        raise ValueError("row 7 cannot be read")

    def state_dict(self) -> dict[str, Any]:
        return {}


def make_trainer(kind: type[Any], loader: Any) -> Any:
    trainer = object.__new__(kind)
    trainer.train_dataloader = loader
    trainer._first_epoch = 0
    trainer.config = SimpleNamespace(trainer=SimpleNamespace(total_epochs=2))
    trainer._prefetched = trainer._fetch_error = None
    return trainer


def fetch_third(trainer: Any) -> Any:
    iterator = trainer._create_continuous_iterator()
    next(iterator), next(iterator)
    return asyncio.run(trainer._async_gen_next_batch(iterator))


def test_error_while_fetching_a_batch_is_raised() -> None:
    assert fetch_third(make_trainer(OneStepOffRayTrainer, BrokenLoader())) is None  # verl's behaviour
    with pytest.raises(RuntimeError, match="could not be fetched") as caught:
        fetch_third(make_trainer(SelfDistillationOneStepOffTrainer, BrokenLoader()))
    assert isinstance(caught.value.__cause__, ValueError)
    assert "row 7" in str(caught.value.__cause__)


def test_iterator_counts_epochs_beyond_total_epochs() -> None:
    trainer = make_trainer(SelfDistillationOneStepOffTrainer, [{}, {}, {}])
    trainer._first_epoch = 1  # a run resumed in its second epoch
    iterator = trainer._create_continuous_iterator()
    assert [next(iterator)[0] for _ in range(8)] == [1, 1, 1, 2, 2, 2, 3, 3]
    stock = make_trainer(OneStepOffRayTrainer, [{}, {}, {}])
    assert len(list(stock._create_continuous_iterator())) == 6


@pytest.mark.parametrize("marked", [False, True], ids=["unmarked", "marked by verl"])
@pytest.mark.parametrize("lengths", [(4, 4, 4), (2, 4, 3), (3,)], ids=["equal", "ragged", "single"])
def test_position_ids_of_images_keep_their_shape(lengths: tuple[int, ...], marked: bool) -> None:
    size, prompt, response = len(lengths), 3, 1
    total = prompt + response
    mask = torch.tensor([[0] * (total - length) + [1] * length for length in lengths])
    positions = torch.arange(size * 4 * total).reshape(size, 4, total)
    data = left_right_2_no_padding(
        TensorDict(
            {
                "input_ids": torch.ones(size, total, dtype=torch.long),
                "attention_mask": mask,
                "position_ids": positions.clone(),
                "response_mask": torch.ones(size, response, dtype=torch.long),
            },
            batch_size=size,
        )
    )
    if len(set(lengths)) == 1:
        assert data["position_ids"]._ragged_idx == 1  # verl takes axis 1, the kinds of positions, for the sequence
    if marked:
        tu.maybe_fix_3d_position_ids(data)  # as in verl's workers
        if lengths == (4, 4, 4):
            with pytest.raises(RuntimeError):
                data["position_ids"].unbind()
    repair_position_ids(data)
    repaired = data["position_ids"]
    assert repaired._ragged_idx == 2
    assert repaired.values().shape == (4, sum(lengths))
    for row, length, part in zip(positions, lengths, repaired.unbind(), strict=True):
        torch.testing.assert_close(part, row[:, -length:])


def test_two_dimensional_position_ids_are_unchanged() -> None:
    parts = [torch.arange(3), torch.arange(3)]
    data = TensorDict({"position_ids": torch.nested.as_nested_tensor(parts, layout=torch.jagged)}, batch_size=2)
    before = data["position_ids"]
    repair_position_ids(data)
    assert data["position_ids"] is before
    assert tu.get(data, "position_ids") is before


def test_logger_of_separate_async_ignores_flush() -> None:
    from verl.trainer.ppo.v1 import trainer_separate_async

    stock = trainer_separate_async.logger
    with pytest.raises(TypeError, match="flush"):
        stock.info("as verl calls it", flush=True)
    FlushIgnoringLogger(stock, {}).info("the same", flush=True)


def test_monkey_patch_accepts_trl_without_the_value_head(
    monkeypatch: pytest.MonkeyPatch, make_model: Callable[..., PreTrainedModel]
) -> None:
    monkeypatch.setitem(sys.modules, "trl", ModuleType("trl"))
    assert engine.workarounds and monkey_patch.is_trl_available is not is_trl_available, "importing the engine patches"
    monkeypatch.setattr(monkey_patch, "is_trl_available", lambda: True)  # with TRL 1.16 installed
    with pytest.raises(ImportError, match="AutoModelForCausalLMWithValueHead"):
        monkey_patch.apply_monkey_patch(make_model())
    skip_trl_value_head()
    monkey_patch.apply_monkey_patch(make_model())


def test_response_length_clip_ratio_is_relative_to_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Responses of 2, 3 and 3 tokens are shorter than the limit of 8. The metrics are computed once per step."""

    def nested(values: float) -> torch.Tensor:
        return torch.nested.as_nested_tensor([torch.full((n,), values) for n in (2, 3, 3)], layout=torch.jagged)

    names = ("prompts", "responses", "response_mask", "advantages", "returns", "rm_scores")
    data = TensorDict({name: nested(1.0) for name in names} | {"num_turns": torch.ones(3)}, batch_size=3)
    fetch = "verl.trainer.ppo.v1.trainer_base.get_metric_data_with_optional_routed_experts"
    monkeypatch.setattr(fetch, lambda **_: data.copy())
    tags = [{"min_global_steps": 0, "max_global_steps": 0}] * 3
    config = {
        "data": {"max_response_length": 8},
        "algorithm": {"use_kl_in_reward": False},
        "actor_rollout_ref": {"rollout": {}, "model": {}},
    }
    calls: list[Any] = []
    summarize = v1_trainers.summarize_rollouts
    monkeypatch.setattr(v1_trainers, "summarize_rollouts", lambda *args: calls.append(args) or summarize(*args))
    monkeypatch.setattr(PPOTrainerSync, "step", lambda trainer, values, timing: batch)
    batch = SimpleNamespace(keys=["a", "b", "c"], partition_id="train", tags=tags)
    health = SimpleNamespace(check=lambda step, values: checked.update(values) or {}, is_stopped=False)
    checked: dict[str, Any] = {}
    found = {}
    for kind in (PPOTrainerSync, v1_trainers.SelfDistillationSyncTrainer):
        trainer = object.__new__(kind)
        trainer.config = OmegaConf.create(config)
        trainer.use_critic, trainer._rollout_moe_lb_metrics_accumulator = False, None
        trainer.resource_pool_manager = SimpleNamespace(get_n_gpus=lambda: 1)
        trainer.scores, trainer.lengths = [2.0, 3.0, 3.0], [2, 3, 3]
        trainer.health, trainer.global_steps = health, 1
        values: dict[str, Any] = {}
        trainer.step(values, {})
        trainer._compute_metrics(batch, values, {"step": 1.0}, global_steps=1, epoch=0)
        found[kind] = values
    stock, ours = found.values()
    assert stock[metrics.RESPONSE_LENGTH_CLIP_RATIO] == pytest.approx(2 / 3)
    assert ours[metrics.RESPONSE_LENGTH_CLIP_RATIO] == 0
    for name in (metrics.SCORE_MEAN, metrics.RESPONSE_LENGTH_MEAN):
        assert ours[name] == pytest.approx(stock[name]) == pytest.approx(8 / 3)
    assert calls == [([2.0, 3.0, 3.0], [2, 3, 3], 8)]
    assert checked == {name: ours[name] for name in checked} and metrics.RESPONSE_LENGTH_CLIP_RATIO in checked


def test_earlier_checkpoints_are_removed_completely_even_after_a_resume(tmp_path: Path) -> None:
    """Only the newest of three checkpoints is kept; the first is from before the resume."""
    stock = object.__new__(BaseCheckpointManager)
    stock.previous_saved_paths = []
    for step in (1, 2, 3):
        actor = tmp_path / "stock" / f"global_step_{step}" / "actor"
        actor.mkdir(parents=True)
        (actor.parent / "data.pt").touch()
        if step > 1:
            stock.register_checkpoint(str(actor), 1)
    left = sorted(str(path.relative_to(tmp_path / "stock")) for path in (tmp_path / "stock").glob("*/*"))
    assert left == [
        *("global_step_1/actor", "global_step_1/data.pt", "global_step_2/data.pt"),
        *("global_step_3/actor", "global_step_3/data.pt"),
    ]

    def begin(resumed: Path | None) -> RunHealth:
        trainer = {
            "default_local_dir": str(tmp_path / "ours"),
            "health_events_file": str(tmp_path / "health_events.jsonl"),
            "max_actor_ckpt_to_keep": 1,
            "save_best_limit": 0,
        }
        actor = {"policy_loss": {"loss_mode": "vanilla"}}
        config = {"trainer": trainer, "actor_rollout_ref": {"actor": actor}, "health": {}}
        return RunHealth(OmegaConf.create(config), None, None, resumed)

    health = begin(None)
    for step in (1, 2, 3):
        folder = tmp_path / "ours" / f"global_step_{step}"
        (folder / "actor").mkdir(parents=True)
        (folder / "data.pt").touch()
        health.note_checkpoint(step)
        health.complete_checkpoint(step)
        if step == 1:
            health = begin(folder)
    left = sorted(str(path.relative_to(tmp_path / "ours")) for path in (tmp_path / "ours").glob("*/*"))
    assert left == [f"global_step_3/{name}" for name in ("actor", "data.pt", "health.json")]
