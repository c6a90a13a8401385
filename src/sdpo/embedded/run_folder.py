"""What a run leaves behind: the resolved run, versions, metrics, rollouts as text, checkpoints."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sdpo import metrics
from sdpo.config import Run, save_run
from sdpo.context.images import format_content
from sdpo.embedded.samples import Sample
from sdpo.embedded.tracking import Tracker, build_trackers, require_trackers
from sdpo.errors import UserError
from sdpo.observer import Observer

PACKAGES = ("sdpo", "torch", "transformers", "omegaconf", "pyarrow", "numpy")


class RunFolder:
    """The folder of one run, open for writing; everything stands directly under it."""

    def __init__(self, run: Run, observer: Observer) -> None:
        self.path = Path(run.run_dir)
        self._run = run
        self._observer = observer
        require_trackers(run)
        try:
            _make_room(self.path, observer)
            self.path.mkdir(parents=True, exist_ok=True)
            save_run(run, self.path / "run.yaml")
        except OSError as error:
            raise UserError(f"run_dir: {self.path}: cannot be written ({error.strerror})") from error
        (self.path / "versions.json").write_text(json.dumps(_collect_versions(), indent=2) + "\n", encoding="utf-8")
        self._trackers: list[Tracker] = build_trackers(run)
        self._metrics = (self.path / "metrics.jsonl").open("w", buffering=1, encoding="utf-8")
        self.final: dict[str, float] = {}

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row of metrics, and tell the trackers and whoever watches."""
        row = {metrics.STEP: step, **{name: float(value) for name, value in values.items()}}
        self._metrics.write(json.dumps(row) + "\n")
        self.final |= row
        for tracker in self._trackers:
            tracker.log(step, row)
        self._observer.metrics(step, row)

    def save_rollouts(self, step: int, samples: Sequence[Sample]) -> None:
        """Write some of the step's samples, with the teacher's prompt, for a person to read."""
        every, count = self._run.tracking.rollouts_every, self._run.tracking.rollouts_per_save
        if every == 0 or (step % every and step != 1):
            return
        folder = self.path / "rollouts"
        folder.mkdir(exist_ok=True)
        stride = max(1, len(samples) // count)
        text = "\n".join(_describe(sample) for sample in samples[::stride][:count])
        (folder / f"step_{step}.txt").write_text(text, encoding="utf-8")

    def close(self) -> None:
        self._metrics.close()
        for tracker in self._trackers:
            tracker.close()


def _make_room(path: Path, observer: Observer) -> None:
    """An earlier run in the folder is moved aside; a folder that holds something else is refused."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / "run.yaml").is_file():
        raise UserError(f"run_dir: {path}: exists and is no run folder; name another one")
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


def _describe(sample: Sample) -> str:
    def conversation(messages: Sequence[Mapping[str, Any]]) -> str:
        return "\n".join(f"[{message['role']}] {format_content(message['content'])}" for message in messages)

    verdict = f"score {sample.grade.score:g}" if sample.is_graded else "not graded"
    parts = [
        f"=== {verdict}, advantage {sample.advantage:g}, {len(sample.response.token_ids)} tokens",
        "--- prompt",
        conversation(sample.prompt.row.prompt),
        "--- response" + ("" if sample.response.finished else " (cut off)"),
        sample.text,
        "--- ground truth",
        sample.prompt.row.ground_truth or "(none)",
        "--- feedback",
        sample.grade.feedback or "(none)",
        "--- teacher's prompt" + (" (trimmed)" if sample.teacher_prompt.truncated else ""),
        conversation(sample.teacher_prompt.messages) if sample.is_distilled else "(not distilled)",
    ]
    return "\n".join(parts) + "\n"
