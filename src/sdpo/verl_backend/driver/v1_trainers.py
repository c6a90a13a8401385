"""verl's V1 trainers with the teacher's batch: ``separate_async`` (two pools of GPUs) and ``sync`` (one pool)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ray
import torch
import transfer_queue as tq
from tensordict import TensorDict
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import trainer_separate_async
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from sdpo.verl_backend.compat.workarounds import FlushIgnoringLogger
from sdpo.verl_backend.driver.failed_rewards import (
    FailedRewardsMixin,
    check_failures,
    correct_advantages,
    replace_scores,
)
from sdpo.verl_backend.driver.health import HealthChecksMixin, RunHealth, summarize_rollouts
from sdpo.verl_backend.driver.one_step_off_trainer import build_teacher_batch, find_resumed, rename_metrics
from sdpo.verl_backend.driver.teacher_batch import Rollout
from sdpo.verl_backend.worker.worker import SelfDistillationActorWorker

FIELDS = ["uid", "raw_prompt", "responses", "response_mask", "rm_scores", "reward_model", "extra_info", "extra_fields"]


class TeacherBatchMixin(FailedRewardsMixin, HealthChecksMixin):
    """Hooks of both trainers: sdpo's worker, the teacher's fields, failed rewards, names of metrics.

    verl pads a batch with rows that are not samples (``is_padding``); they are excluded everywhere.
    """

    config: Any
    tokenizer: Any
    processor: Any
    global_steps: int
    total_training_steps: int
    parameter_sync_step: int
    role_worker_mapping: dict[Role, Any]
    actor_rollout_wg: Any

    def _setup(self) -> None:
        super()._setup()  # type: ignore[misc]
        self.teacher_batch = build_teacher_batch(self.config, self.tokenizer, self.processor, self.total_training_steps)
        self.health = RunHealth(
            self.config, self.teacher_batch, self.actor_rollout_wg, find_resumed(self.config, self.global_steps)
        )
        # Of the step's samples so far: scores (NaN for a failed reward) and response lengths in tokens.
        self.scores: list[float] = []
        self.lengths: list[int] = []
        self.rollout_metrics: dict[str, float] = {}  # of the last complete step

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()  # type: ignore[misc]
        for role in (Role.Actor, Role.ActorRollout, Role.ActorRolloutRef, Role.RefPolicy):
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(SelfDistillationActorWorker)

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        rollouts = self._read_rollouts(batch)
        samples = [rollout for rollout in rollouts if rollout is not None]
        self.scores += [sample.score for sample in samples]
        self.lengths += [len(sample.response_ids) for sample in samples]
        if self.teacher_batch is not None:
            fields, values = self.teacher_batch.build(rollouts, self.global_steps)
            tq.kv_batch_put(
                keys=batch.keys,
                partition_id=batch.partition_id,
                fields=TensorDict(fields, batch_size=len(batch)),
            )
            metrics.update(values)
        batch = super()._compute_advantage(batch, metrics)  # type: ignore[misc]
        self._correct_advantages(batch, rollouts)
        return batch

    def _correct_advantages(self, batch: Any, rollouts: Sequence[Rollout | None]) -> None:
        rewards = "token_level_rewards" if self.config.algorithm.use_kl_in_reward else "rm_scores"
        data = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["response_mask", rewards, "advantages"]
        )
        advantages = correct_advantages(
            data["advantages"].unbind(),
            data["response_mask"].unbind(),
            torch.stack([values.sum() for values in data[rewards].unbind()]),
            [rollout is not None and rollout.is_failed for rollout in rollouts],
            [i if rollout is None else rollout.uid for i, rollout in enumerate(rollouts)],
            self.config,
        )
        nested = torch.nested.as_nested_tensor(advantages, layout=torch.jagged)
        fields = TensorDict({"advantages": nested}, batch_size=len(batch))
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)

    def _read_rollouts(self, batch: Any) -> list[Rollout | None]:
        """Return the batch's rollouts in its order; None for padding.

        Raises:
            DataError: see ``check_failures``.
            RuntimeError: a rollout is missing.
        """
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=FIELDS)
        responses, masks, scores = (data[name].unbind() for name in ("responses", "response_mask", "rm_scores"))
        # The queue returns stacks of objects or plain lists.
        uids, prompts, truths, infos_of_rows, extras = (
            values.tolist() if hasattr(values := data[name], "tolist") else list(values)
            for name in ("uid", "raw_prompt", "reward_model", "extra_info", "extra_fields")
        )
        read_solution = self.teacher_batch.read_solution if self.teacher_batch is not None else lambda *_: None
        present = [i for i, tag in enumerate(batch.tags) if not tag.get("is_padding", False)]
        self._check_complete([batch.keys[i] for i in present])
        infos = {i: (extras[i] or {}).get("reward_extra_info") or {} for i in present}
        failed = check_failures(list(infos.values()), self.config, f"step {self.global_steps}")
        rollouts: list[Rollout | None] = [None] * len(batch)
        for i, is_failed in zip(present, failed, strict=True):
            rollouts[i] = Rollout(
                uid=uids[i],
                messages=list(prompts[i]),
                response_ids=responses[i].tolist(),
                response_mask=masks[i].tolist(),
                score=math.nan if is_failed else float(scores[i].sum()),
                feedback=infos[i].get("feedback"),
                ground_truth=read_solution(truths[i], infos_of_rows[i]),
            )
        return rollouts

    def _check_complete(self, keys: Sequence[str]) -> None:
        """Refuse a batch with missing rollouts; verl logs their error and trains on the others.

        https://github.com/verl-project/verl/issues/6437
        """
        found = len({key.rsplit("_", 1)[0] for key in keys})
        wanted = self.config.data.train_batch_size // self.parameter_sync_step * self.config.actor_rollout_ref.rollout.n
        if found < wanted:
            raise RuntimeError(
                f"step {self.global_steps}: {wanted - found} of {wanted} rollouts are missing; see the log of verl's "
                "agent loop workers"
            )

    def _compute_metrics(self, batch: Any, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super()._compute_metrics(batch, metrics, *args, **kwargs)  # type: ignore[misc]
        replace_scores(metrics, self.scores, self.config)
        metrics |= self.rollout_metrics  # verl has overwritten them
        self.scores, self.lengths = [], []

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, Any]) -> Any:
        batch = super().step(metrics, timing_raw)  # type: ignore[misc]
        self.rollout_metrics = summarize_rollouts(self.scores, self.lengths, self.config.data.max_response_length)
        metrics |= self.rollout_metrics
        metrics |= self.health.check(self.global_steps, metrics)
        if self.health.is_stopped:
            self._end_here()
        return batch

    def _end_here(self) -> None:
        """Make this step the last; verl chooses its last step earlier, so save and validate this step by frequency."""
        trainer = self.config.trainer
        self.total_training_steps = self.global_steps
        trainer.save_freq, trainer.test_freq = min(trainer.save_freq, 1), min(trainer.test_freq, 1)

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._update_actor(batch, metrics)  # type: ignore[misc]
        rename_metrics(metrics)
        return batch


class SelfDistillationSyncTrainer(TeacherBatchMixin, PPOTrainerSync):  # type: ignore[misc]
    """Sampling and training take turns on the same GPUs."""


class SelfDistillationSeparateAsyncTrainer(TeacherBatchMixin, PPOTrainerSeparateAsync):  # type: ignore[misc]
    """Sampling and training on separate GPUs; verl's maintained successor of one-step-off."""


def register() -> None:
    """Replace verl's trainers in its registry, where its runner finds them by name."""
    trainer_separate_async.logger = FlushIgnoringLogger(trainer_separate_async.logger, {})
    TRAINER_REGISTRY["sync"] = SelfDistillationSyncTrainer
    TRAINER_REGISTRY["separate_async"] = SelfDistillationSeparateAsyncTrainer
