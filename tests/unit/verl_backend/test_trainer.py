"""The order of a step of the one-step-off trainer, with verl's own ``fit_step`` and made-up workers."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from sdpo import metrics
from sdpo.verl_backend.trainer import SelfDistillationOneStepOffTrainer

TOTAL = 4
QUIET = ("start_profile", "stop_profile", "dump_data", "collect_metrics", "experimental", "save_checkpoint")
SAME = ("compute_reward", "compute_log_prob", "compute_ref_log_prob", "compute_critic", "compute_advantage")


class Run:
    """A trainer whose weights are a number: how often they were updated."""

    def __init__(self, test_freq: int) -> None:
        self.learner, self.sampler = 0, 0
        self.batches: list[tuple[int, int]] = []  # the sampler's weights when it began and ended one
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
        trainer._fit_update_actor = self.learn
        self.trainer = trainer

    def update_weights(self, _: int) -> None:
        self.sampler = self.learner

    def learn(self, batch: Any) -> Any:
        self.learner += 1
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
def test_an_evaluation_is_of_the_weights_after_the_update(test_freq: int) -> None:
    run = Run(test_freq)
    asyncio.run(run.fit())
    assert sorted(run.rows) == [1, 2, 3, 4]
    evaluated = {step: row["val"] for step, row in run.rows.items() if "val" in row}
    assert evaluated == {step: step for step in (1, 2, 3, 4) if step % test_freq == 0 or step == TOTAL}
    assert all((metrics.TIME_EVAL in row) == (step in evaluated) for step, row in run.rows.items())
    assert run.trainer.last_val_metrics == {"val": TOTAL}


def test_the_batch_ahead_is_sampled_by_the_weights_that_its_step_began_with() -> None:
    run = Run(test_freq=1)
    asyncio.run(run.fit())
    assert run.batches == [(0, 0), (0, 0), (1, 1), (2, 2)]


def test_without_evaluations_nothing_waits_for_the_batch_ahead() -> None:
    run = Run(test_freq=-1)
    asyncio.run(run.fit())
    assert not any("val" in row for row in run.rows.values()) and run.sampler == TOTAL - 1
