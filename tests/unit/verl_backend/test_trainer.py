"""The order of a step of the one-step-off trainer, with verl's own ``fit_step`` and mocked workers."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from sdpo.observability import metrics
from sdpo.verl_backend.driver.one_step_off_trainer import SelfDistillationOneStepOffTrainer
from sdpo.verl_backend.driver.v1_trainers import SelfDistillationSyncTrainer

TOTAL = 4
QUIET = ("start_profile", "stop_profile", "dump_data", "collect_metrics", "experimental", "save_checkpoint")
SAME = ("compute_reward", "compute_log_prob", "compute_ref_log_prob", "compute_critic", "compute_advantage")


class MockTrainer:
    """A trainer whose weights are the number of updates."""

    def __init__(self, test_freq: int) -> None:
        self.actor, self.sampler = 0, 0
        self.batches: list[tuple[int, int]] = []  # the sampler's weights at the start and the end of each batch
        self.rows: dict[int, dict[str, Any]] = {}
        trainer = object.__new__(SelfDistillationOneStepOffTrainer)
        trainer.config = OmegaConf.create({"trainer": {"test_freq": test_freq, "critic_warmup": 0}})
        trainer.global_steps, trainer.total_training_steps, trainer.epoch = 1, TOTAL, 0
        trainer._saved_step, trainer.max_steps_duration, trainer.last_val_metrics = -1, 0.0, None
        trainer.actor_rollout_wg = object()
        trainer.checkpoint_manager = SimpleNamespace(update_weights=self.update_weights)
        trainer.logger = SimpleNamespace(log=lambda data, step: self.rows.update({step: data}))
        trainer.progress_bar = SimpleNamespace(update=lambda _: None, close=lambda: None)
        trainer._shutdown_dump_executor = lambda: None
        trainer._validate = lambda: {"val": self.sampler}
        trainer._async_gen_next_batch = self.sample
        for name in QUIET:
            setattr(trainer, f"_fit_{name}", lambda *_: None)
        for name in (*SAME, "update_critic"):
            setattr(trainer, f"_fit_{name}", lambda batch: batch)
        trainer._fit_update_actor = self.update_policy
        self.trainer = trainer

    def update_weights(self, _: int) -> None:
        self.sampler = self.actor

    def update_policy(self, batch: Any) -> Any:
        self.actor += 1
        return batch

    async def sample(self, _: Any) -> Any:
        began = self.sampler
        for _ in range(100):  # longer than a step lasts
            await asyncio.sleep(0)
        self.batches.append((began, self.sampler))
        return {}, {}, 0, SimpleNamespace(meta_info={"timing": {}}), None

    async def fit(self) -> None:
        self.trainer.config.actor_rollout_ref = {"rollout": {"temperature": 1.0}}
        ahead: Any = asyncio.create_task(self.sample(None))
        while ahead is not None:
            ahead = await self.trainer.fit_step(ahead, None)


@pytest.mark.parametrize("test_freq", [1, 3])
def test_evaluation_uses_the_updated_weights(test_freq: int) -> None:
    run = MockTrainer(test_freq)
    asyncio.run(run.fit())
    assert sorted(run.rows) == [1, 2, 3, 4]
    evaluated = {step: row["val"] for step, row in run.rows.items() if "val" in row}
    assert evaluated == {step: step for step in (1, 2, 3, 4) if step % test_freq == 0 or step == TOTAL}
    assert all((metrics.TIME_EVAL in row) == (step in evaluated) for step, row in run.rows.items())
    assert run.trainer.last_val_metrics == {"val": TOTAL}


def test_batch_ahead_is_sampled_with_the_weights_at_the_start_of_the_step() -> None:
    run = MockTrainer(test_freq=1)
    asyncio.run(run.fit())
    assert run.batches == [(0, 0), (0, 0), (1, 1), (2, 2)]


def test_last_update_is_not_synced_without_evaluations() -> None:
    run = MockTrainer(test_freq=-1)
    asyncio.run(run.fit())
    assert not any("val" in row for row in run.rows.values()) and run.sampler == TOTAL - 1


@pytest.mark.parametrize("test_freq", [3, -1])
def test_run_ends_with_the_step_that_a_health_check_stops(test_freq: int) -> None:
    """A health check fails at step 2: this step is saved and, if ``test_freq`` is positive, evaluated; the run ends."""
    run = MockTrainer(test_freq)
    trainer, saved = run.trainer, list[int]()
    trainer.config.data = {"max_response_length": 3}
    trainer._fit_update_actor = type(trainer)._fit_update_actor.__get__(trainer)
    trainer._update_actor = lambda batch: SimpleNamespace(meta_info={"metrics": {"actor/loss": [float(bool(batch))]}})
    trainer._fit_save_checkpoint = lambda: saved.append(trainer.global_steps) if trainer.is_last_step else None
    attention = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    trainer._fit_compute_reward = lambda _: SimpleNamespace(
        batch={"prompts": attention[:, :2], "responses": attention[:, 2:], "attention_mask": attention}
    )
    seen: dict[int, tuple[float, ...]] = {}

    def check(step: int, values: dict[str, Any]) -> dict[str, float]:
        names = (metrics.SCORE_MEAN, metrics.RESPONSE_LENGTH_MEAN, metrics.RESPONSE_LENGTH_CLIP_RATIO, metrics.LOSS)
        seen[step] = tuple(values[name] for name in names)
        trainer.health.is_stopped = step == 2
        return {metrics.NUM_WARNINGS: float(step == 2)}

    trainer.health = SimpleNamespace(check=check, is_stopped=False)
    trainer.scores = [1.0, 0.5]

    async def fit() -> None:
        trainer.config.actor_rollout_ref = {"rollout": {"temperature": 1.0}}
        ahead: Any = asyncio.create_task(run.sample(None))
        while ahead is not None:  # verl's own loop
            ahead = await trainer.fit_step(ahead, None)
            if trainer.is_last_step:
                return

    asyncio.run(fit())
    assert seen == {step: (0.75, 2.0, 0.5, 1.0) for step in (1, 2)}
    assert {step: row[metrics.NUM_WARNINGS] for step, row in run.rows.items()} == {1: 0, 2: 1}
    assert saved == [2]
    assert ["val" in row for row in run.rows.values()] == [False, test_freq > 0]


def test_v1_trainer_ends_with_the_current_step() -> None:
    """verl's loop chooses its last step earlier, so a frequency of 1 saves and validates the current step."""
    trainer = object.__new__(SelfDistillationSyncTrainer)
    trainer.config = OmegaConf.create({"trainer": {"save_freq": 50, "test_freq": 10}})
    trainer.global_steps, trainer.total_training_steps = 7, 100
    trainer._end_here()
    assert trainer.total_training_steps == 7
    assert trainer.config.trainer == {"save_freq": 1, "test_freq": 1}
    trainer.config.trainer = {"save_freq": -1, "test_freq": 0}
    trainer._end_here()
    assert trainer.config.trainer == {"save_freq": -1, "test_freq": 0}, "neither is wanted"
