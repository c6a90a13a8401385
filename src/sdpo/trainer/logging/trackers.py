"""Experiment trackers: TensorBoard, Weights & Biases and Trackio; each library is imported only if it is used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from sdpo.config.monitoring import TrackingConfig
from sdpo.errors import ConfigError


class Tracker(Protocol):
    """Receives every row of metrics."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


LIBRARIES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


class TensorBoard:
    """Writes event files into ``OUTPUT_DIR/tensorboard``; a resumed run drops the rows from ``resumed_step`` on."""

    def __init__(self, output_dir: Path, resumed_step: int | None) -> None:
        module = _require("tensorboard")
        self._writer: Any = module.SummaryWriter(str(output_dir / "tensorboard"), purge_step=resumed_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbLike:
    """Sends rows to Weights & Biases, or to Trackio, which has the same interface.

    The libraries read from their environment variables which tracked run a resumed run continues.
    """

    def __init__(self, backend: str, project: str, name: str, settings: Mapping[str, Any]) -> None:
        self._module = _require(backend)
        self._module.init(project=project, name=name, config=settings)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        self._module.finish()


def require_trackers(config: TrackingConfig) -> None:
    """Check that the libraries of ``tracking.report_to`` are installed.

    Raises:
        ConfigError: a library is missing.
    """
    for backend in config.report_to:
        _require(backend)


def build_trackers(
    config: TrackingConfig, output_dir: Path, settings: Mapping[str, Any], resumed_step: int | None = None
) -> list[Tracker]:
    """Start the trackers of ``tracking.report_to``; they may write into ``output_dir`` immediately.

    Args:
        settings: all settings of the run, which the trackers show.
        resumed_step: step of the checkpoint that the run resumes from; None: the run is new.

    Raises:
        ConfigError: a library is not installed.
    """
    name = config.name or output_dir.name
    return [
        TensorBoard(output_dir, resumed_step)
        if backend == "tensorboard"
        else WandbLike(backend, config.project, name, settings)
        for backend in config.report_to
    ]


def _require(backend: str) -> ModuleType:
    try:
        return importlib.import_module(LIBRARIES[backend])
    except ImportError as error:
        raise ConfigError(f"tracking.report_to={backend}: is not installed; pip install 'sdpo[{backend}]'") from error
