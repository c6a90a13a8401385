"""The training worker: verl's, with sdpo's engine and the teacher's update after each rollout batch."""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from typing import Any

import torch.distributed as dist
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker

from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.verl_backend.compat.workarounds import repair_position_ids
from sdpo.verl_backend.config.schema import import_sampler, read_regularization, read_self_distillation
from sdpo.verl_backend.worker.engine import MODEL_TYPE, EngineSettings, SelfDistillationEngineConfig


class SelfDistillationTrainingWorker(TrainingWorker):  # type: ignore[misc]
    """Student and teacher of one rank."""

    def __init__(self, config: TrainingWorkerConfig, settings: EngineSettings) -> None:
        engine_config = SelfDistillationEngineConfig.extend(config.engine_config, settings)
        super().__init__(dataclasses.replace(config, model_type=MODEL_TYPE, engine_config=engine_config))

    def train_mini_batch(self, data: Any) -> Any:
        """Train on every mini-batch of a rollout batch, then update the teacher."""
        repair_position_ids(data)  # before verl splits the batch into mini-batches
        keep_loaded = tu.pop(data, key="disable_auto_offload", default=False)
        tu.assign_non_tensor(data, disable_auto_offload=True)
        # Update the teacher before weights are offloaded: verl does not wait for its copies to the host.
        with self.engine.train_mode(disable_auto_offload=keep_loaded):
            output = super().train_mini_batch(data)
            self.engine.step_teacher()
        counts = self.engine.counts
        if output is not None:
            # Totals of the rollout batch; verl would average over mini-batches.
            tu.get(output, "metrics").update({name: [float(count)] for name, count in counts.items()})
        counts.update(dict.fromkeys(counts, 0))
        return output


class SelfDistillationActorWorker(DetachActorWorker):  # type: ignore[misc]
    """verl's actor or its reference policy; with ``policy_loss.loss_mode=sdpo`` both have sdpo's engine.

    The reference policy's engine has no teacher. verl's own engine computes the logits of all tokens at once, needs
    flash-attn for packed rows, and is not registered for CPUs.
    """

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def init_model(self) -> None:
        if get_device_name() == "cpu" and not dist.is_initialized():
            # verl has no backend name for a process group of CPUs alone.
            dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
        import_sampler(self.config.rollout)
        actor = self.config.actor
        self_distillation = read_self_distillation(actor)
        if self_distillation is not None:
            self.ref_worker_cls = partial(
                SelfDistillationTrainingWorker,
                settings=EngineSettings(SelfDistillationConfig(policy_loss_weight=1.0)),
            )
            self.actor_worker_cls = partial(
                SelfDistillationTrainingWorker,
                settings=EngineSettings(
                    self_distillation,
                    loss_agg_mode=actor.loss_agg_mode,
                    horizon=actor.loss_scale_factor or self.config.rollout.response_length,
                    freeze_vision_tower=actor.freeze_vision_tower,
                    regularization=read_regularization(actor),
                ),
            )
        super().init_model()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def freeze_teacher(self) -> None:
        """See ``TeacherEngine.freeze``."""
        self.actor.engine.freeze_teacher()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def snapshot_best(self) -> None:
        """See ``TeacherEngine.snapshot_best``."""
        self.actor.engine.snapshot_best()
