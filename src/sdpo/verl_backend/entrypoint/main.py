"""Start a run on verl: ``python -m sdpo.verl_backend.entrypoint.main [--config-name NAME] [--cfg] key=value ...``.

NAME is ``sdpo_trainer`` (one step off policy), ``sdpo_separate_async`` or ``sdpo_sync``; the overrides are Hydra's.
The config is composed and checked before Ray starts, so that a mistake is reported within seconds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from sdpo.errors import ConfigError, SDPOError
from sdpo.prompting.run_date import RUN_DATE, begin_run
from sdpo.verl_backend.entrypoint import runners
from sdpo.verl_backend.entrypoint.compose import compose_config
from sdpo.verl_backend.entrypoint.model_checks import check_model

USAGE = "usage: python -m sdpo.verl_backend.entrypoint.main [--config-name NAME] [--cfg] [key=value ...]"
CPU = "+device=cpu"
CPU_ENVIRONMENT = {
    "VERL_PLATFORM": "cpu",
    "OMP_NUM_THREADS": "1",  # of Ray's workers; tiny models are slower with two threads
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
METRICS_PATH = "VERL_FILE_LOGGER_PATH"
PLACEHOLDER_RESOURCES = ("num_cpus", "num_gpus", "object_store_memory")  # in cpu/config/device/cpu.yaml


def train(config: DictConfig, before_start: Callable[[DictConfig], object] | None = None) -> None:
    """Start Ray and train until the end.

    Args:
        config: from ``compose_config``.
        before_start: called after all checks, before Ray starts.

    Raises:
        ConfigError: this machine lacks something, or the model cannot be loaded or used, and Ray has not been started;
            or the data do not fit the model.
    """
    from sdpo.verl_backend.entrypoint.requirements import check_machine, joins_cluster

    if config.trainer.device == "cpu" and joins_cluster(config):
        for name in PLACEHOLDER_RESOURCES:  # ray.init refuses resources for a cluster that already runs
            config.ray_kwargs.ray_init[name] = None
    if RUN_DATE not in os.environ:
        begin_run()
    forward_environment(config)
    check_model(config)
    check_machine(config)
    if before_start is not None:
        before_start(config)
    # Ray gives up after 30 s, in which a node does not start on a machine whose cores are busy.
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")
    metrics = os.environ.get(METRICS_PATH)
    if metrics is not None:
        Path(metrics).parent.mkdir(parents=True, exist_ok=True)  # verl's logger does not
    from verl.plugin.platform.platform_manager import PlatformRegistry
    from verl.trainer.main_ppo import run_ppo

    if PlatformRegistry.get("cpu") is None:
        raise ConfigError(
            "verl has not loaded the plugin of sdpo; install sdpo in verl's environment: pip install sdpo"
        )
    runner = runners.ResultKeepingRunner(
        runners.build_v1_runner() if config.trainer.use_v1 else runners.build_one_step_off_runner()
    )
    try:
        run_ppo(config, task_runner_class=runner)
        stopped_by = runner.get_result()
    except SDPOError as error:  # Ray's wrapper has a traceback in its text
        raise getattr(error, "cause", error) from None
    if stopped_by:
        print(f"stopped by a health check: {stopped_by}", file=sys.stderr)


def forward_environment(config: DictConfig) -> None:
    """Pass variables of this process to Ray's workers; in a running cluster they inherit the cluster's environment.

    Without it, verl would write the metrics of such a run into the folder in which the cluster was started.
    """
    found = {name: os.environ[name] for name in (METRICS_PATH, RUN_DATE, *CPU_ENVIRONMENT) if name in os.environ}
    given = config.ray_kwargs.ray_init.runtime_env.get("env_vars") or {}
    OmegaConf.update(config, "ray_kwargs.ray_init.runtime_env.env_vars", {**found, **given}, force_add=True)


def main(arguments: Sequence[str], before_start: Callable[[DictConfig], object] | None = None) -> None:
    """Run the command line; ``before_start`` is called after all checks, before Ray starts.

    Raises:
        ConfigError: see ``compose_config`` and ``train``.
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
            raise ConfigError(f"{argument!r}: not of the form key=value; {USAGE}")
        else:
            overrides.append(argument)
    if CPU in overrides:
        for variable, value in CPU_ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
    config = compose_config(name, overrides)
    if show:
        print(OmegaConf.to_yaml(config))
        return
    train(config, before_start)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SDPOError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
