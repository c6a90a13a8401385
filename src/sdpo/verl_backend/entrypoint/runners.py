"""Ray actors in which a trainer runs, as verl's own runners, with sdpo's trainers and workers."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from omegaconf import DictConfig


class ResultKeepingRunner:
    """Wraps Ray's class of a runner for ``run_ppo``, and keeps the result of ``run``, which verl drops."""

    def __init__(self, actor_class: Any) -> None:
        self._actor_class = actor_class

    def options(self, **options: Any) -> ResultKeepingRunner:
        self._actor_class = self._actor_class.options(**options)
        return self

    def remote(self) -> Any:
        self._actor = self._actor_class.remote()
        return SimpleNamespace(run=SimpleNamespace(remote=self._run))

    def _run(self, config: DictConfig) -> Any:
        self._result = self._actor.run.remote(config)
        return self._result

    def get_result(self) -> Any:
        import ray

        return ray.get(self._result)


def build_one_step_off_runner() -> Any:
    import ray

    @ray.remote(num_cpus=1, max_concurrency=100)
    class OneStepOffRunner:
        def run(self, config: DictConfig) -> str | None:
            self.sockets = _claim_sockets(config)
            return train_one_step_off(config)

    return OneStepOffRunner


def build_v1_runner() -> Any:
    import ray

    @ray.remote(num_cpus=1)
    class V1Runner:
        def run(self, config: DictConfig) -> str | None:
            self.sockets = _claim_sockets(config)
            return train_v1(config)

    return V1Runner


def _claim_sockets(config: DictConfig) -> Any:
    import ray

    from sdpo.verl_backend.entrypoint.sockets import claim_sockets

    if config.actor_rollout_ref.rollout.name != "vllm":
        return None
    return claim_sockets(ray.get_runtime_context().get_job_id())


def train_one_step_off(config: DictConfig) -> str | None:
    """Train in this process, Ray's driver, with verl's one-step-off trainer.

    Returns:
        The health check that stopped the run, with its reason; None if none did.
    """
    import ray
    from verl.experimental.separation.utils import create_resource_pool_manager, create_role_worker_mapping
    from verl.trainer.ppo.utils import Role, create_rl_dataset, create_rl_sampler
    from verl.utils import hf_processor, hf_tokenizer
    from verl.utils.dataset.rl_dataset import collate_fn
    from verl.utils.fs import copy_to_local

    from sdpo.verl_backend.config.schema import import_sampler
    from sdpo.verl_backend.driver.one_step_off_trainer import SelfDistillationOneStepOffTrainer
    from sdpo.verl_backend.worker.worker import SelfDistillationActorWorker

    import_sampler(config.actor_rollout_ref.rollout)
    workers, group = create_role_worker_mapping(config)
    for role in (Role.Actor, Role.RefPolicy):
        if role in workers:
            workers[role] = ray.remote(SelfDistillationActorWorker)
    model = config.actor_rollout_ref.model
    path = copy_to_local(model.path, use_shm=model.use_shm)
    tokenizer = hf_tokenizer(path, trust_remote_code=model.trust_remote_code)
    processor = hf_processor(path, trust_remote_code=model.trust_remote_code, use_fast=True)

    def load(kind: str) -> Any:
        return create_rl_dataset(
            config.data[f"{kind}_files"],
            config.data,
            tokenizer,
            processor,
            is_train=kind == "train",
            max_samples=config.data[f"{kind}_max_samples"],
        )

    train_dataset = load("train")
    trainer = SelfDistillationOneStepOffTrainer(
        config=config,
        tokenizer=tokenizer,
        processor=processor,
        role_worker_mapping=workers,
        resource_pool_manager=create_resource_pool_manager(config, workers.keys()),
        ray_worker_group_cls=group,
        train_dataset=train_dataset,
        val_dataset=load("val"),
        collate_fn=collate_fn,
        train_sampler=create_rl_sampler(config.data, train_dataset),
        device_name=config.trainer.device,
    )
    trainer.init_workers()
    asyncio.run(trainer.fit())
    return trainer.health.describe_stop()


def train_v1(config: DictConfig) -> str | None:
    """Train in this process, Ray's driver, with verl's V1 runner, which finds sdpo's trainers in verl's registry.

    Returns:
        The health check that stopped the run, with its reason; None if none did.
    """
    from verl.trainer.main_ppo import TaskRunnerV1

    from sdpo.verl_backend.config.schema import import_sampler
    from sdpo.verl_backend.driver import v1_trainers

    import_sampler(config.actor_rollout_ref.rollout)
    v1_trainers.register()
    runner = TaskRunnerV1.__ray_metadata__.modified_class()
    runner.run(config)
    return runner.trainer.health.describe_stop()
