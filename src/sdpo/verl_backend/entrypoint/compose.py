"""Composition of a run's configuration by Hydra, with SDPO's schema, and its checks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdpo.errors import ConfigError

# verl's config files name a folder in its repository here, which an installed verl does not have.
SEARCH_PATH = "hydra.searchpath=[pkg://verl.trainer.config,pkg://sdpo.verl_backend.cpu.config]"


def compose_config(name: str, overrides: Sequence[str]) -> DictConfig:
    """Return the complete configuration of a run, resolved and checked.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of range, settings that contradict each other.
    """
    from sdpo.verl_backend.config.schema import check_config, complete_turns

    _register_schema()
    try:
        with initialize_config_module("sdpo.verl_backend.config", version_base=None):
            config = compose(name, overrides=[SEARCH_PATH, *overrides])
        complete_turns(config)
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error
    check_config(config)
    _check_files(config)
    _check_with_verl(config)
    if config.actor_rollout_ref.rollout.multi_turn.enable:
        from sdpo.verl_backend.driver.tools import load_tool_schemas

        load_tool_schemas(config.actor_rollout_ref.rollout)
    return config


def _register_schema() -> None:
    """Register SDPO's sections under the names that ``config/*.yaml`` lists in its defaults."""
    from sdpo.config.monitoring import HealthConfig
    from sdpo.config.self_distillation import SelfDistillationConfig
    from sdpo.verl_backend.config.schema import build_schema

    for section in (SelfDistillationConfig, HealthConfig):
        ConfigStore.instance().store(name=section.section, node=build_schema(section), group="sdpo")


def _check_files(config: DictConfig) -> None:
    for key in ("train_files", "val_files"):
        files = config.data[key]
        for file in [files] if isinstance(files, str) else files:
            if not Path(file).expanduser().is_file():
                raise ConfigError(f"data.{key}={file}: no such file; create it, or name another file")


def _check_with_verl(config: DictConfig) -> None:
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    try:
        validate_config(config, need_reference_policy(config), need_critic(config))
    except (AssertionError, ValueError) as error:
        raise ConfigError(_explain(error)) from error


def _explain(error: BaseException) -> str:
    """Return the first cause of an error in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = getattr(error, "full_key", None)
    message = lines[0] if lines else type(error).__name__
    return f"{key}: {message}" if key and key not in message else message
