"""Metrics to TensorBoard, Weights & Biases and Trackio, each by its own library, imported only where asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from sdpo.config.root import SDPOConfig
from sdpo.errors import ConfigError


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


LIBRARIES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


class TensorBoard:
    """Event files in ``RUN_DIR/tensorboard``."""

    def __init__(self, run: SDPOConfig, resumed_step: int | None) -> None:
        module = _require("tensorboard")
        self._writer: Any = module.SummaryWriter(str(Path(run.output_dir) / "tensorboard"), purge_step=resumed_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbLike:
    """Weights & Biases, and Trackio, which has the same interface."""

    def __init__(self, run: SDPOConfig, backend: str) -> None:
        self._module = _require(backend)
        name = run.tracking.name or Path(run.output_dir).name
        self._module.init(project=run.tracking.project, name=name, config=asdict(run))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        self._module.finish()


def require_trackers(run: SDPOConfig) -> None:
    """Check that the libraries of ``tracking.report_to`` are there.

    Raises:
        ConfigError: one is not installed.
    """
    for backend in run.tracking.report_to:
        _require(backend)


def build_trackers(run: SDPOConfig, resumed_step: int | None = None) -> list[Tracker]:
    """The trackers that ``tracking.report_to`` names; they may write into the run's folder at once.

    TensorBoard forgets the rows from ``resumed_step`` on; which run the others go on with is theirs to be told, by
    their environment variables.

    Raises:
        ConfigError: a library is not installed.
    """
    return [
        TensorBoard(run, resumed_step) if backend == "tensorboard" else WandbLike(run, backend)
        for backend in run.tracking.report_to
    ]


def _require(backend: str) -> ModuleType:
    try:
        return importlib.import_module(LIBRARIES[backend])
    except ImportError as error:
        raise ConfigError(f"tracking.report_to: {backend} is not installed; pip install 'sdpo[{backend}]'") from error
