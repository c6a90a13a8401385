"""Read the output folder of a run: metrics, settings and health events."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdpo.errors import ConfigError
from sdpo.file_lock import is_locked
from sdpo.observability.health_callback import HEALTH_EVENTS_FILE
from sdpo.observability.json_lines import read_json_lines
from sdpo.observability.metrics import STEP, find_accuracies, replace_old_names
from sdpo.observability.run_folder import LOCK_FILE

METRICS_FILE = "metrics.jsonl"
RUN_FILE = "run.yaml"
OLD_HEALTH_EVENTS_FILE = "alarms.jsonl"  # of earlier versions


@dataclass(frozen=True)
class RunRecord:
    """A run: its metrics with one row per step, its settings by dotted key, and its failed health checks."""

    name: str
    path: Path
    rows: Sequence[Mapping[str, float]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    health_events: Sequence[Mapping[str, Any]] = ()
    is_running: bool = False

    @property
    def last_step(self) -> int:
        return int(self.rows[-1][STEP])

    @property
    def max_steps(self) -> int | None:
        """Steps of the complete run; None if its settings are not there."""
        number = self.settings.get("max_steps")
        return number if isinstance(number, int) else None

    @property
    def stop(self) -> str | None:
        """Where the run ended, if it is neither complete nor running, such as ``11 of 30``."""
        if self.max_steps is None or self.last_step >= self.max_steps or self.is_running:
            return None
        return f"{self.last_step} of {self.max_steps}"

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of the rows that have the metric; NaN and infinities are kept."""
        rows = [row for row in self.rows if metric in row]
        return [int(row[STEP]) for row in rows], [row[metric] for row in rows]

    def final(self, metric: str) -> float | None:
        """The last value, including NaN, so that a failed run is visible."""
        return next(reversed(self.series(metric)[1]), None)

    def best(self, metric: str) -> float | None:
        """The highest finite value."""
        return max(filter(math.isfinite, self.series(metric)[1]), default=None)

    def accuracies(self) -> dict[str, str]:
        """Headline statistics by data source (``metrics.find_accuracies``)."""
        return find_accuracies(name for row in self.rows for name in row)


def read_run(path: str | Path) -> RunRecord:
    """Read the output folder of a run.

    Raises:
        ConfigError: the folder or its ``metrics.jsonl`` is missing, empty or malformed; names the line.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"{path}: no such run folder; give the output_dir of a run")
    metrics_file = path / METRICS_FILE
    if not metrics_file.is_file():
        raise ConfigError(f"{path}: no {METRICS_FILE}; give the output_dir of a run that has completed a step")
    rows = _read_rows(metrics_file)
    if not rows:
        raise ConfigError(f"{metrics_file}: no metrics yet; wait for the first step")
    settings = _read_settings(path / RUN_FILE)
    events_file = next(filter(Path.is_file, (path / HEALTH_EVENTS_FILE, path / OLD_HEALTH_EVENTS_FILE)), None)
    events = _read_events(events_file, last_step=int(rows[-1][STEP])) if events_file else ()
    name = str(settings.get("tracking.name") or path.resolve().name)
    return RunRecord(name, path, rows, settings, events, is_locked(path / LOCK_FILE))


def read_runs(paths: Sequence[str | Path]) -> list[RunRecord]:
    """Read several output folders, each once, and give the runs different names."""
    folders: dict[Path, Path] = {}
    for path in paths:
        folders.setdefault(Path(path).resolve(), Path(path))
    return _make_names_unique([read_run(folder) for folder in folders.values()])


def _make_names_unique(records: list[RunRecord]) -> list[RunRecord]:
    """Replace equal names by the shortest ends of the paths that differ."""
    count = Counter(record.name for record in records)
    duplicates = {id(record): record.path.resolve().parts for record in records if count[record.name] > 1}
    length = 1
    while len({parts[-length:] for parts in duplicates.values()}) < len(duplicates):
        length += 1
    return [
        replace(record, name=Path(*duplicates[id(record)][-length:]).as_posix()) if id(record) in duplicates else record
        for record in records
    ]


def _read_rows(path: Path) -> list[dict[str, float]]:
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")
    rows: list[dict[str, float]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # being written, or left by a killed run
                break
            raise ConfigError(f"{path}:{number}: not a JSON object ({error.msg}); fix or remove the line") from None
        _append(rows, _to_row(content, f"{path}:{number}"))
    return rows


def _to_row(content: Any, where: str) -> dict[str, float]:
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: not a JSON object; fix or remove the line")
    if isinstance(content.get("data"), dict):  # verl's format of a row
        content = {STEP: content.get("step"), **content["data"]}
    row = {name: float(value) for name, value in content.items() if isinstance(value, (int, float))}
    if not math.isfinite(row.get(STEP, math.nan)):
        raise ConfigError(f"{where}: no number under {STEP}; fix or remove the line")
    return replace_old_names(row)


def _read_events(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Health events up to the last step; incomplete lines of killed runs are skipped."""
    events = [event for event in read_json_lines(path) if isinstance(event, dict)]
    return [event for event in events if isinstance(event.get("step"), int) and event["step"] <= last_step]


def _append(rows: list[dict[str, float]], row: dict[str, float]) -> None:
    # A resumed run repeats the steps after its checkpoint; rows of the first attempt are dropped.
    while rows and rows[-1][STEP] > row[STEP]:
        rows.pop()
    if rows and rows[-1][STEP] == row[STEP]:
        row = {**rows.pop(), **row}
    rows.append(row)


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    from omegaconf import OmegaConf

    from sdpo.config.loader import flatten_keys

    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # yaml raises various errors
        raise ConfigError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    return flatten_keys(content) if isinstance(content, dict) else {}
