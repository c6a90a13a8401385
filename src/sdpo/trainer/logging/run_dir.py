"""What a run leaves behind: the resolved run, versions, metrics, rollouts as text, checkpoints."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from sdpo.config.loader import save_config
from sdpo.config.root import SDPOConfig
from sdpo.errors import ConfigError
from sdpo.observability import metrics
from sdpo.observability.health_callback import HEALTH_EVENTS_FILE, drop_events_after
from sdpo.observability.json_lines import append_json_line, read_json_lines, write_json_lines
from sdpo.observability.progress import ProgressCallback
from sdpo.prompting.images import format_content
from sdpo.trainer.data.samples import TrainingSample
from sdpo.trainer.logging.trackers import Tracker, build_trackers, require_trackers

METRICS_FILE = "metrics.jsonl"
LOCK_FILE = ".lock"
PACKAGES = ("sdpo", "torch", "transformers", "omegaconf", "pyarrow", "numpy")


class RunDir:
    """The folder of one run, open for writing; everything stands directly under it.

    Args:
        run: whose folder it is.
        observer: is told what becomes of an earlier run in it, and every row of metrics.
        resumed_step: the step of the checkpoint that the run goes on from; its row and all later ones are written anew.
            None if it begins.

    Raises:
        ConfigError: the folder cannot be written, holds something else than a run, or another run is writing to it.
    """

    def __init__(self, run: SDPOConfig, observer: ProgressCallback, resumed_step: int | None = None) -> None:
        self.path = Path(run.output_dir)
        self._run = run
        self._observer = observer
        require_trackers(run)
        try:
            require_idle(self.path)
            if resumed_step is None:
                _make_room(self.path, observer)
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path)
            save_config(run, self.path / "run.yaml")
            (self.path / "versions.json").write_text(json.dumps(_collect_versions(), indent=2) + "\n", encoding="utf-8")
            kept = _read_rows_before(self.path / METRICS_FILE, resumed_step) if resumed_step is not None else []
            write_json_lines(self.path / METRICS_FILE, kept)
            if resumed_step is not None:
                drop_events_after(self.path / HEALTH_EVENTS_FILE, resumed_step)
            self._metrics = (self.path / METRICS_FILE).open("a", buffering=1, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"output_dir: {self.path}: cannot be written ({error.strerror})") from error
        self._trackers: list[Tracker] = build_trackers(run, resumed_step)
        self.final: dict[str, float] = {}
        for row in kept:
            self.final |= row

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row of metrics, and tell the trackers and whoever watches."""
        row = {metrics.STEP: step, **{name: float(value) for name, value in values.items()}}
        with self._writing():
            self._metrics.write(json.dumps(row) + "\n")
        self.final |= row
        for tracker in self._trackers:
            tracker.log(step, row)
        self._observer.metrics(step, row)

    def log_health_event(self, alarm: Mapping[str, Any]) -> None:
        """Append an alarm to the file of them, which is made when there is one."""
        with self._writing():
            append_json_line(self.path / HEALTH_EVENTS_FILE, alarm)

    def save_rollouts(self, step: int, samples: Sequence[TrainingSample]) -> None:
        """Write some of the step's samples, with the teacher's prompt, for a person to read."""
        every, count = self._run.tracking.log_completions_steps, self._run.tracking.num_completions
        if every == 0 or (step % every and step != 1):
            return
        stride = max(1, len(samples) // count)
        text = "\n".join(_describe(sample) for sample in samples[::stride][:count])
        with self._writing():
            folder = self.path / "rollouts"
            folder.mkdir(exist_ok=True)
            (folder / f"step_{step}.txt").write_text(text, encoding="utf-8")

    def sync(self) -> None:
        """Have the disk itself hold the rows so far."""
        with self._writing():
            os.fsync(self._metrics.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written has been said
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
                f"output_dir: {self.path}: cannot be written ({error.strerror}); what was saved before is intact: "
                "make room and resume"
            ) from error


def require_idle(path: Path) -> None:
    """Refuse a folder that another run is writing to.

    Raises:
        ConfigError: there is such a run; names its process.
    """
    if (path / LOCK_FILE).is_file():
        with contextlib.suppress(OSError):  # a folder that cannot be written is refused elsewhere
            _lock(path).close()


def _lock(path: Path) -> IO[str]:
    """The file whose lock says that a run is writing here; the system lets go of it when the process ends."""
    file = (path / LOCK_FILE).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        who = file.read().strip()
        file.close()
        raise ConfigError(
            f"output_dir: {path}: another run is writing to it ({who}); wait for it, stop it, or name another folder"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def _read_rows_before(path: Path, step: int) -> list[dict[str, float]]:
    return [row for row in read_json_lines(path) if row[metrics.STEP] < step]


def _make_room(path: Path, observer: ProgressCallback) -> None:
    """An earlier run in the folder is moved aside; a folder that holds something else is refused."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / "run.yaml").is_file():
        raise ConfigError(f"output_dir: {path}: exists and is no run folder; name another one")
    number = 1
    while path.with_name(f"{path.name}.{number}").exists():
        number += 1
    moved = path.with_name(f"{path.name}.{number}")
    path.rename(moved)
    observer.message(f"{path} held an earlier run; moved to {moved}")


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

    verdict = f"score {sample.reward.score:g}" if sample.is_scored else "not scored"
    parts = [
        f"=== {verdict}, advantage {sample.advantage:g}, {len(sample.response.token_ids)} tokens",
        "--- prompt",
        conversation(sample.prompt.row.prompt),
        "--- response" + ("" if sample.response.finished else " (cut off)"),
        sample.text,
        "--- ground truth",
        sample.prompt.row.ground_truth or "(none)",
        "--- feedback",
        sample.reward.feedback or "(none)",
        "--- teacher's prompt" + (" (trimmed)" if sample.teacher_prompt.truncated else ""),
        conversation(sample.teacher_prompt.messages) if sample.is_distilled else "(not distilled)",
    ]
    return "\n".join(parts) + "\n"
