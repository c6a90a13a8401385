"""verl's V1 trainers with the teacher's batch: ``separate_async`` (two pools of GPUs) and ``sync`` (one pool)."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import ray
import transfer_queue as tq
from tensordict import TensorDict
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import trainer_separate_async
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from sdpo import metrics as names
from sdpo.verl_backend.teacher_batch import Rollout, read_ground_truth
from sdpo.verl_backend.trainer import build_teacher_batch, rename_metrics
from sdpo.verl_backend.worker import SelfDistillationActorWorker

FIELDS = ["uid", "raw_prompt", "responses", "rm_scores", "reward_model", "extra_fields"]


class WithTeacherBatch:
    """The trainer hooks of both: our worker, the teacher's fields before the advantages, our metrics' names."""

    config: Any
    tokenizer: Any
    processor: Any
    global_steps: int
    total_training_steps: int
    role_worker_mapping: dict[Role, Any]

    def _setup(self) -> None:
        super()._setup()  # type: ignore[misc]
        self.teacher_batch = build_teacher_batch(self.config, self.tokenizer, self.processor, self.total_training_steps)

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()  # type: ignore[misc]
        for role in (Role.Actor, Role.ActorRollout, Role.ActorRolloutRef):
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(SelfDistillationActorWorker)

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        if self.teacher_batch is not None:
            fields, values = self.teacher_batch.build(self._read_rollouts(batch), self.global_steps)
            tq.kv_batch_put(
                keys=batch.keys,
                partition_id=batch.partition_id,
                fields=TensorDict(fields, batch_size=len(batch)),
            )
            metrics.update(values)
        versions = [tag["min_global_steps"] for tag in batch.tags if tag.get("min_global_steps") is not None]
        if versions:
            # The weights after step k are named k here; step k begins with those named k - 1.
            metrics[names.STALENESS] = self.global_steps - 1 - int(np.min(versions))
        return super()._compute_advantage(batch, metrics)  # type: ignore[misc]

    def _read_rollouts(self, batch: Any) -> list[Rollout]:
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=FIELDS)
        responses, scores = data["responses"].unbind(), data["rm_scores"].unbind()
        # Stacks of objects or plain lists, whichever the queue made of them.
        uids, prompts, truths, extras = (
            values.tolist() if hasattr(values := data[name], "tolist") else list(values)
            for name in ("uid", "raw_prompt", "reward_model", "extra_fields")
        )
        return [
            Rollout(
                group=uids[i],
                messages=list(prompts[i]),
                response_ids=responses[i].tolist(),
                score=float(scores[i].sum()),
                feedback=(extras[i] or {}).get("reward_extra_info", {}).get("feedback"),
                ground_truth=read_ground_truth(truths[i]),
            )
            for i in range(len(batch))
        ]

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._update_actor(batch, metrics)  # type: ignore[misc]
        rename_metrics(metrics)
        return batch


class SelfDistillationSyncTrainer(WithTeacherBatch, PPOTrainerSync):  # type: ignore[misc]
    """Sampling and learning take turns on the same GPUs."""


class SelfDistillationSeparateAsyncTrainer(WithTeacherBatch, PPOTrainerSeparateAsync):  # type: ignore[misc]
    """Sampling and learning each have GPUs of their own; verl's maintained successor of one-step-off."""


class _AcceptsFlush(logging.LoggerAdapter):  # type: ignore[type-arg]
    def process(self, msg: Any, kwargs: Any) -> Any:
        kwargs.pop("flush", None)
        return msg, kwargs


def register() -> None:
    """Put these in the places of verl's own, which its runner looks up by the same names."""
    # verl 0.9.1 calls its logger with print's flush where hybrid_engine is false, which raises.
    trainer_separate_async.logger = _AcceptsFlush(trainer_separate_async.logger, {})
    TRAINER_REGISTRY["sync"] = SelfDistillationSyncTrainer
    TRAINER_REGISTRY["separate_async"] = SelfDistillationSeparateAsyncTrainer
