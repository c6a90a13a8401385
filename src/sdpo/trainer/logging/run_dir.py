"""The output folder of a run: config, package versions, metrics, health events, rollouts as text, checkpoints."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sdpo.config.monitoring import TrackingConfig
from sdpo.errors import ConfigError
from sdpo.observability import metrics
from sdpo.observability.health_callback import HEALTH_EVENTS_FILE, drop_events_after
from sdpo.observability.json_lines import append_json_line, read_json_lines, write_json_lines
from sdpo.observability.progress import ProgressCallback
from sdpo.observability.run_folder import CONFIG_FILE, lock_folder, move_earlier_run, require_idle
from sdpo.prompting.images import format_content
from sdpo.trainer.data.samples import TrainingSample
from sdpo.trainer.logging.trackers import Tracker, build_trackers, require_trackers

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
PACKAGES = ("sdpo", "torch", "transformers", "omegaconf", "pyarrow", "numpy")


class RunDir:
    """The output folder of a run, locked against other runs while it is open.

    Args:
        config: how rollouts are written, and the trackers.
        progress: receives every row of metrics.
        resumed_step: step of the checkpoint that the run resumes from; the rows from it on are dropped, since the run
            writes them again. None: the run is new, and an earlier run in the folder is moved aside.

    Raises:
        ConfigError: a tracker is not installed, the folder cannot be written or is no run folder, or another run is
            writing to it.
    """

    def __init__(
        self, path: Path, config: TrackingConfig, progress: ProgressCallback, resumed_step: int | None = None
    ) -> None:
        self.path = path
        self.final: dict[str, float] = {}
        self._config = config
        self._progress = progress
        self._resumed_step = resumed_step
        self._trackers: list[Tracker] = []
        require_trackers(config)
        try:
            require_idle(self.path)
            if resumed_step is None:
                moved = move_earlier_run(self.path)
                if moved is not None:
                    logger.info(f"output_dir={self.path}: moved the earlier run to {moved}")
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.path)
            kept = _read_rows_before(self.path / METRICS_FILE, resumed_step) if resumed_step is not None else []
            write_json_lines(self.path / METRICS_FILE, kept)
            if resumed_step is not None:
                drop_events_after(self.path / HEALTH_EVENTS_FILE, resumed_step)
            self._metrics = (self.path / METRICS_FILE).open("a", buffering=1, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"output_dir={self.path}: cannot be written ({error.strerror})") from error
        for row in kept:
            self.final |= row

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def write_config(self, text: str, values: Mapping[str, Any]) -> None:
        """Write the config file and the package versions, and start the trackers, which record the config too.

        Call it once, directly after the constructor: the config file marks the folder as one of a run.

        Args:
            text: the config as YAML.
            values: the config as nested mappings.
        """
        with self._writing():
            (self.path / CONFIG_FILE).write_text(text, encoding="utf-8")
            (self.path / "versions.json").write_text(json.dumps(_collect_versions(), indent=2) + "\n", encoding="utf-8")
        self._trackers = build_trackers(self._config, self.path, values, self._resumed_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row of metrics, and send it to the trackers and the callback."""
        row = {metrics.STEP: step, **{name: float(value) for name, value in values.items()}}
        with self._writing():
            self._metrics.write(json.dumps(row) + "\n")
        self.final |= row
        for tracker in self._trackers:
            tracker.log(step, row)
        self._progress.on_metrics(step, row)

    def log_health_event(self, event: Mapping[str, Any]) -> None:
        """Append a health event to its file; the first event creates the file."""
        with self._writing():
            append_json_line(self.path / HEALTH_EVENTS_FILE, event)

    def save_rollouts(self, step: int, samples: Sequence[TrainingSample]) -> None:
        """Write some of the step's samples with the teacher's prompts as readable text, if that is due."""
        every, count = self._config.log_completions_steps, self._config.num_completions
        if every == 0 or (step % every and step != 1):
            return
        stride = max(1, len(samples) // count)
        text = "\n".join(_describe(sample) for sample in samples[::stride][:count])
        with self._writing():
            folder = self.path / "rollouts"
            folder.mkdir(exist_ok=True)
            (folder / f"step_{step}.txt").write_text(text, encoding="utf-8")

    def sync(self) -> None:
        """Flush the metrics to the disk with fsync."""
        with self._writing():
            os.fsync(self._metrics.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # ``log`` has raised it before
            self._metrics.close()
        for tracker in self._trackers:
            tracker.close()
        self._lock.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"output_dir={self.path}: cannot be written ({error.strerror}); files saved before are intact: free "
                "disk space and resume"
            ) from error


def _read_rows_before(path: Path, step: int) -> list[dict[str, float]]:
    return [row for row in read_json_lines(path) if row[metrics.STEP] < step]


def _collect_versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _describe(sample: TrainingSample) -> str:
    def conversation(messages: Sequence[Mapping[str, Any]]) -> str:
        return "\n".join(f"[{message['role']}] {format_content(message['content'])}" for message in messages)

    row, solution = sample.prompt.row, sample.prompt.solution
    shown = ["--- solution", solution] if solution and solution != row.ground_truth else []
    verdict = f"score {sample.rollout.score:g}" if sample.is_scored else "not scored"
    parts = [
        f"=== {verdict}, advantage {sample.advantage:g}, {len(sample.response.token_ids)} tokens",
        "--- prompt",
        conversation(row.prompt),
        "--- response" + ("" if sample.response.finished else " (truncated)"),
        sample.rollout.response,
        "--- ground truth",
        row.ground_truth or "(none)",
        *shown,
        "--- feedback",
        sample.rollout.feedback or "(none)",
        "--- teacher's prompt" + (" (truncated)" if sample.teacher_prompt.truncated else ""),
        conversation(sample.teacher_prompt.messages) if sample.is_distilled else "(not distilled)",
    ]
    return "\n".join(parts) + "\n"
