"""Checkpoint folders: whole, or not there.

One is written beside its place, told to the disk file by file, and renamed. ``manifest.json`` in it has the size and
the checksum of every file, so that damage done later is found before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdpo.errors import CheckpointError
from sdpo.retention import select_kept

MANIFEST = "manifest.json"
_STEP = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        step: the step after which it was written.
        score: the held-out accuracy at that step; None if it was not evaluated.
        files: [size in bytes, SHA-256] by path within the folder.
    """

    step: int
    score: float | None
    files: dict[str, tuple[int, str]]


def save_checkpoint(folder: Path, step: int, score: float | None, write: Callable[[Path], None]) -> Path:
    """``folder/step_K`` with what ``write`` puts into the folder that it is given.

    Raises:
        CheckpointError: the disk is full or does not let itself be written; what was saved before is as it was.
    """
    target, partial = folder / f"step_{step}", folder / f".step_{step}.partial"
    try:
        _remove_partial(folder)
        partial.mkdir(parents=True)
        write(partial)
        files = {name: _fsync_and_hash(partial / name) for name in sorted(_list_files(partial))}
        manifest = partial / MANIFEST
        manifest.write_text(json.dumps(asdict(Manifest(step, score, files)), indent=1) + "\n", encoding="utf-8")
        _sync(manifest)
        for path in [p for p in partial.rglob("*") if p.is_dir()] + [partial]:
            _sync(path)
        if target.exists():  # damaged, or a run would not have come by here again
            target.rename(folder / f".step_{step}.old.partial")
        partial.rename(target)
        _sync(folder)
    except Exception as error:
        reason = _find_disk_fault(error, folder)
        shutil.rmtree(partial, ignore_errors=True)
        if reason is None:
            raise
        raise CheckpointError(
            f"{target}: cannot be saved ({reason}); what was saved before is intact: make room and resume"
        ) from error
    _remove_partial(folder)
    return target


def find_newest(folder: Path, tell: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; ``tell`` hears of each newer one that is not, and why."""
    for path in reversed(_list_checkpoints(folder)):
        fault = verify_checkpoint(path)
        if fault is None:
            return path
        tell(f"{path} is damaged ({fault}); the one before it is taken")
    return None


def verify_checkpoint(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if nothing is."""
    try:
        manifest = read_manifest(checkpoint)
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{MANIFEST}: {type(error).__name__}: {error}"
    for name, (size, checksum) in manifest.files.items():
        path = checkpoint / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
            if _compute_checksum(path) != checksum:
                return f"{name} has other content than was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def read_manifest(checkpoint: Path) -> Manifest:
    content: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    return Manifest(
        int(content["step"]),
        content["score"],
        {name: (int(size), str(checksum)) for name, (size, checksum) in content["files"].items()},
    )


def prune_checkpoints(folder: Path, save_total_limit: int, save_best_limit: int) -> None:
    """Remove all but the newest ``save_total_limit`` and the best ``save_best_limit``; of equal scores the newer."""
    scores: dict[int, float | None] = {}
    for path in _list_checkpoints(folder):
        try:
            scores[_read_step(path)] = read_manifest(path).score
        except (OSError, ValueError, TypeError, KeyError):
            continue  # a damaged one is not ours to judge
    for step in scores.keys() - select_kept(scores, save_total_limit, save_best_limit):
        # At no time does half a one stand under its name.
        (folder / f"step_{step}").rename(folder / f".step_{step}.partial")
    _remove_partial(folder)


def _list_checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted((path for path in folder.glob("step_*") if _STEP.fullmatch(path.name)), key=_read_step)


def _read_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _list_files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _fsync_and_hash(path: Path) -> tuple[int, str]:
    _sync(path)
    return path.stat().st_size, _compute_checksum(path)


def _compute_checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Have the disk itself hold a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_partial(folder: Path) -> None:
    for path in folder.glob(".step_*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def _find_disk_fault(error: Exception, folder: Path) -> str | None:
    """What failed if it was the disk; safetensors and torch wrap the system's error in errors of their own."""
    text = " ".join(str(error).split())
    if not (isinstance(error, OSError) or type(error).__name__ == "SafetensorError" or "inline_container" in text):
        return None
    existing = next(path for path in [folder, *folder.parents] if path.exists())
    return "no space left on the disk" if shutil.disk_usage(existing).free < 2**20 else text
