"""Start a run on verl: ``python -m sdpo.verl_backend.entrypoint.main [--config-name NAME] [--cfg] key=value ...``.

NAME is ``sdpo_trainer`` (one step off policy), ``sdpo_separate_async`` or ``sdpo_sync``; the overrides are Hydra's.
Composition, checks and Ray come in this order, so that a mistake costs a second and not a cluster.
"""

from __future__ import annotations

import asyncio
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdpo.errors import ConfigError, SDPOError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sdpo.config.model import LoraConfig

USAGE = "usage: python -m sdpo.verl_backend.entrypoint.main [--config-name NAME] [--cfg] [key=value ...]"
CPU = "+device=cpu"
INVENTED_RESOURCES = ("num_cpus", "num_gpus", "object_store_memory")  # in cpu/config/device/cpu.yaml
# verl's own files name a folder of its sources here, which an installed verl does not have.
SEARCH_PATH = "hydra.searchpath=[pkg://verl.trainer.config,pkg://sdpo.verl_backend.cpu.config]"


def compose_config(name: str, overrides: Sequence[str]) -> DictConfig:
    """The whole configuration of a run, resolved and checked.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of range, settings that contradict each other.
    """
    from sdpo.config.monitoring import HealthConfig
    from sdpo.config.self_distillation import SelfDistillationConfig
    from sdpo.verl_backend.config.schema import build_schema, check_config, complete_turns

    for section in (SelfDistillationConfig, HealthConfig):
        ConfigStore.instance().store(name=section.section, node=build_schema(section), group="sdpo")
    try:
        with initialize_config_module("sdpo.verl_backend.config", version_base=None):
            config = compose(name, overrides=[SEARCH_PATH, *overrides])
        complete_turns(config)
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error
    check_config(config)
    _check_with_verl(config)
    if config.actor_rollout_ref.rollout.multi_turn.enable:
        from sdpo.verl_backend.driver.tools import load_tool_schemas

        load_tool_schemas(config.actor_rollout_ref.rollout)
    return config


def _check_with_verl(config: DictConfig) -> None:
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    for key in ("train_files", "val_files"):
        files = config.data[key]
        for file in [files] if isinstance(files, str) else files:
            if not Path(file).expanduser().is_file():
                raise ConfigError(f"data.{key}: {file}: no such file; make it, or name another one")
    try:
        validate_config(config, need_reference_policy(config), need_critic(config))
    except (AssertionError, ValueError) as error:
        raise ConfigError(_explain(error)) from error


def _check_model(config: DictConfig) -> None:
    from sdpo.config.model import ModelConfig
    from sdpo.models.loading import build_meta_model, get_window, reads_images
    from sdpo.verl_backend.config.schema import LOSS_MODE, read_lora
    from sdpo.verl_backend.entrypoint.requirements import check_sampler_reads

    model = config.actor_rollout_ref.model
    path = os.path.expanduser(model.path)
    try:
        plain = build_meta_model(ModelConfig(path=path, trust_remote_code=model.trust_remote_code))
        limit_length(config, get_window(plain))
        if reads_images(ModelConfig(path=path, trust_remote_code=model.trust_remote_code)):
            _check_processor(path, trust_remote_code=model.trust_remote_code)
        elif config.actor_rollout_ref.actor.freeze_vision_tower:
            raise ConfigError(f"actor.freeze_vision_tower=True: {model.path} has no vision tower; set it to false")
        if config.actor_rollout_ref.actor.policy_loss.loss_mode == LOSS_MODE:
            _check_adapters(plain, read_lora(model))
    except SDPOError as error:
        raise ConfigError(f"actor_rollout_ref.{error}") from error
    if config.actor_rollout_ref.rollout.name == "vllm":
        check_sampler_reads(plain.config, model.path)


def limit_length(config: DictConfig, window: int | None) -> None:
    """Let the sampler make room for the longest sequence; by itself vLLM makes it for all that the model can read."""
    rollout = config.actor_rollout_ref.rollout
    if rollout.max_model_len is None:
        longest = rollout.prompt_length + rollout.response_length
        rollout.max_model_len = longest if window is None else min(longest, window)


def _check_adapters(plain: PreTrainedModel, lora: LoraConfig) -> None:
    from sdpo.models.lora.adapters import find_target_layers

    if lora.rank == 0:
        return
    try:
        find_target_layers(plain, lora)
    except SDPOError as error:
        said = str(error).replace("lora.target_modules", "model.target_modules", 1)
        raise ConfigError(said.replace("lora.rank", "model.lora_rank", 1)) from error


def _check_processor(path: str, *, trust_remote_code: bool) -> None:
    """verl would go on without a processor, and say later that rows with images cannot be read."""
    from verl.utils import hf_processor

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        processor = hf_processor(path, trust_remote_code=trust_remote_code)
    if processor is None:
        reasons = [str(w.message) for w in caught if str(w.message).startswith("Failed to create processor")]
        reason = " ".join(reasons[-1].split()) if reasons else "it has none"
        raise ConfigError(f"model.path: {path}: verl cannot load its processor of images ({reason})")


def run(config: DictConfig) -> None:
    """Start Ray and train until the end.

    Raises:
        ConfigError: this machine lacks something, or the model cannot be loaded or used, and Ray has not been started;
            or the data do not fit the model.
    """
    from sdpo.verl_backend.entrypoint.requirements import check_machine, joins_cluster

    if config.trainer.device == "cpu" and joins_cluster(config):
        for name in INVENTED_RESOURCES:  # a cluster that runs already has its own, and ray.init refuses others
            config.ray_kwargs.ray_init[name] = None
    _check_model(config)
    check_machine(config)
    metrics = os.environ.get("VERL_FILE_LOGGER_PATH")
    if metrics is not None:
        Path(metrics).parent.mkdir(parents=True, exist_ok=True)  # verl does not
    from verl.plugin.platform.platform_manager import PlatformRegistry
    from verl.trainer.main_ppo import run_ppo

    if PlatformRegistry.get("cpu") is None:
        raise ConfigError(
            "verl has not loaded the plugin of sdpo; install sdpo again beside this verl: pip install sdpo"
        )
    runner = _Runner(_build_v1_runner() if config.trainer.use_v1 else _build_one_step_off_runner())
    try:
        run_ppo(config, task_runner_class=runner)
        stopped_by = runner.get_result()
    except SDPOError as error:  # out of Ray's process, with a traceback in its text
        raise getattr(error, "cause", error) from None
    if stopped_by:
        print(f"stopped by a health check: {stopped_by}", file=sys.stderr)


class _Runner:
    """What ``run_ppo`` takes for Ray's class of the driver: keeps the result of its ``run``, which verl drops."""

    def __init__(self, actor_class: Any) -> None:
        self._actor_class = actor_class

    def options(self, **options: Any) -> _Runner:
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


def _build_one_step_off_runner() -> Any:
    import ray

    @ray.remote(num_cpus=1, max_concurrency=100)
    class OneStepOffRunner:
        def run(self, config: DictConfig) -> str | None:
            self.sockets = _claim_sockets(config)
            return train_one_step_off(config)

    return OneStepOffRunner


def _build_v1_runner() -> Any:
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
    """In Ray's driver process: what verl's own runner does, with our trainer and worker.

    Returns:
        The alarm that stopped the run and its reason; None if none did.
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
    """In Ray's driver process: verl's own V1 runner, which finds our trainers in the registry.

    Returns:
        The alarm that stopped the run and its reason; None if none did.
    """
    from verl.trainer.main_ppo import TaskRunnerV1

    from sdpo.verl_backend.config.schema import import_sampler
    from sdpo.verl_backend.driver import v1_trainers

    import_sampler(config.actor_rollout_ref.rollout)
    v1_trainers.register()
    runner = TaskRunnerV1.__ray_metadata__.modified_class()
    runner.run(config)
    return runner.trainer.health.describe_stop()


def _explain(error: BaseException) -> str:
    """The last cause of an error in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = getattr(error, "full_key", None)
    message = lines[0] if lines else type(error).__name__
    return f"{key}: {message}" if key and key not in message else message


def main(arguments: Sequence[str]) -> None:
    """The command line.

    Raises:
        ConfigError: see ``compose_config``.
    """
    name, show, overrides, rest = "sdpo_trainer", False, [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument in ("-h", "--help"):
            print(USAGE)
            return
        if argument in ("-c", "--cfg"):
            show = True
        elif argument.startswith("--config-name"):
            _, _, given = argument.partition("=")
            name = given or (rest.pop(0) if rest else "")
        elif "=" not in argument and not argument.startswith("~"):
            raise ConfigError(f"{argument!r} is not of the form key=value; {USAGE}")
        else:
            overrides.append(argument)
    if CPU in overrides:
        os.environ.setdefault("VERL_PLATFORM", "cpu")
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of Ray's workers; models this small are slower on two
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    config = compose_config(name, overrides)
    if show:
        print(OmegaConf.to_yaml(config))
        return
    run(config)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SDPOError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
