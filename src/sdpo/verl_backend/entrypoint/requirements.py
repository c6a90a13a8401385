"""What a run on GPUs needs, checked before Ray starts: devices, packages, a model that vLLM can load."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Iterator
from typing import Any

import torch
from omegaconf import DictConfig
from ray._private.utils import get_ray_address_file, read_ray_address

from sdpo.errors import ConfigError

ROLLOUT, MODEL, OPTIM = "actor_rollout_ref.rollout", "actor_rollout_ref.model", "actor_rollout_ref.actor.optim"


def check_machine(config: DictConfig) -> None:
    """Refuse a run that would stop, minutes after its start, for want of a device or a package.

    Only a run on this machine alone is checked for devices: of a Ray cluster, the other nodes are unknown here.

    Raises:
        ConfigError: the first thing that is missing, with the command or setting that mends it.
    """
    if config.trainer.device != "cuda":
        return
    for problem in _find_problems(config):
        raise ConfigError(problem)


def _find_problems(config: DictConfig) -> Iterator[str]:
    rollout, optim = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor.optim
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
            "pip install flash-attn --no-build-isolation, or set it to sdpa (model.attn_implementation in a run file)"
        )
    package = str(optim.get("optimizer_impl") or "torch").partition(".")[0]
    if not _is_installed(package):
        yield f"{OPTIM}.optimizer_impl={optim.optimizer_impl}: {package} is not installed; pip install {package}"


def joins_cluster(config: DictConfig) -> bool:
    """Whether ``ray.init`` will connect to a cluster that runs already.

    Raises:
        ConfigError: Ray has noted one, as ``ray start`` does, that no longer answers; Ray would wait for it for
            minutes.
    """
    address = config.ray_kwargs.ray_init.get("address") or os.environ.get("RAY_ADDRESS")
    if address:
        return bool(address != "local")
    noted = read_ray_address()
    if noted and not _answers(noted):
        raise ConfigError(
            f"{get_ray_address_file(None)} names a Ray cluster at {noted} that does not answer; run ray stop, or start "
            "the cluster again, or set RAY_ADDRESS=local for one of this run's own"
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


def check_sampler_reads(architecture: Any, path: str) -> None:
    """Refuse a model that vLLM would build with heads of another size than transformers does.

    Args:
        architecture: the model's configuration (transformers).
        path: of the model, for the message.

    Raises:
        ConfigError: its ``head_dim`` is not ``hidden_size / num_attention_heads``, which vLLM's Qwen2 takes for it
            (https://github.com/vllm-project/vllm, model_executor/models/qwen2.py of 0.24).
    """
    text = architecture.get_text_config()
    size = getattr(text, "head_dim", None)
    if text.model_type.startswith("qwen2") and size and size * text.num_attention_heads != text.hidden_size:
        raise ConfigError(
            f"{MODEL}.path: {path}: vLLM cannot sample from it: its head_dim={size} is not hidden_size / "
            f"num_attention_heads = {text.hidden_size} / {text.num_attention_heads}; take another model"
        )


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
