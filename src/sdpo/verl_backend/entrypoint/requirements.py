"""Checks of devices and packages, before Ray starts."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Iterator

import torch
from omegaconf import DictConfig
from ray._private.utils import get_ray_address_file, read_ray_address

from sdpo.errors import ConfigError
from sdpo.models.optimizer import require_compiler, require_optimizer

ROLLOUT, MODEL, OPTIM = "actor_rollout_ref.rollout", "actor_rollout_ref.model", "actor_rollout_ref.actor.optim"


def check_machine(config: DictConfig) -> None:
    """Refuse a run that would stop minutes after its start because a device or package is missing.

    Devices are counted only for a run on this machine alone; the other nodes of a Ray cluster are not visible from
    here.

    Raises:
        ConfigError: the first missing device, package or compiler, with the command or setting that fixes it.
    """
    module = config.actor_rollout_ref.actor.optim.get("optimizer_impl") or "torch.optim"
    setting = f"{OPTIM}.optimizer_impl={module}"
    require_optimizer(module, setting)
    if config.trainer.device != "cuda":
        return
    if module == "torchao.optim":
        require_compiler(setting)
    for problem in _find_problems(config):
        raise ConfigError(problem)


def _find_problems(config: DictConfig) -> Iterator[str]:
    rollout = config.actor_rollout_ref.rollout
    if not joins_cluster(config):
        yield from _find_missing_devices(config)
    if rollout.name == "vllm" and not _is_installed("vllm"):
        yield f"{ROLLOUT}.name=vllm: vLLM is not installed; pip install 'sdpo[verl,vllm]'"
    sends_by_nccl = rollout.checkpoint_engine.backend == "nccl" and not config.actor_rollout_ref.hybrid_engine
    if sends_by_nccl and not _is_installed("cupy"):
        cuda = (torch.version.cuda or "13").partition(".")[0]
        yield f"{ROLLOUT}.checkpoint_engine.backend=nccl: verl needs CuPy for it; pip install cupy-cuda{cuda}x"
    attention = config.actor_rollout_ref.model.override_config.get("attn_implementation")
    if attention == "flash_attention_2" and not _is_installed("flash_attn"):
        yield (
            f"{MODEL}.override_config.attn_implementation=flash_attention_2: flash-attn is not installed; "
            "pip install flash-attn --no-build-isolation, or use sdpa (in a config file: model.attn_implementation)"
        )


def joins_cluster(config: DictConfig) -> bool:
    """Return whether ``ray.init`` will connect to a running cluster.

    Raises:
        ConfigError: the cluster that ``ray start`` recorded does not answer; Ray would wait minutes for it.
    """
    address = config.ray_kwargs.ray_init.get("address") or os.environ.get("RAY_ADDRESS")
    if address:
        return bool(address != "local")
    noted = read_ray_address()
    if noted and not _answers(noted):
        raise ConfigError(
            f"{get_ray_address_file(None)} names a Ray cluster at {noted} that does not answer; run ray stop, or start "
            "the cluster again, or set RAY_ADDRESS=local to start a separate Ray"
        )
    return bool(noted)


def _answers(address: str, timeout: float = 5.0) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout).close()
    except (OSError, ValueError):
        return False
    return True


def _find_missing_devices(config: DictConfig) -> Iterator[str]:
    train, sample = config.trainer, config.actor_rollout_ref.rollout
    needed, kinds = train.nnodes * train.n_gpus_per_node, "for sampling and training in turns"
    if not config.actor_rollout_ref.hybrid_engine:
        num_samplers = sample.nnodes * sample.n_gpus_per_node
        kinds = f"{needed} for training, {num_samplers} for sampling"
        needed += num_samplers
    if needed > torch.cuda.device_count():
        hint = "start a Ray cluster first (ray start --head; on the other nodes ray start --address=...)"
        if needed == 2:
            hint = (
                "on one GPU sampling and training take turns: max_staleness=0 (sdpo verl), or --config-name sdpo_sync"
            )
        yield (
            f"trainer.n_gpus_per_node: this run needs {needed} GPUs ({kinds}), and this machine has "
            f"{torch.cuda.device_count()}; {hint}"
        )


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
