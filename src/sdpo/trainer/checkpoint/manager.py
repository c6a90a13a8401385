"""Atomic checkpoints: written to a temporary folder, fsynced, then renamed.

``manifest.json`` has the size and the checksum of every file, so that later damage is found before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdpo.errors import CheckpointError
from sdpo.retention import select_kept

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_STEP = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class Manifest:
    """Content of ``manifest.json``.

    Attributes:
        step: number of training steps before the checkpoint.
        score: validation accuracy at that step; None if it was not evaluated.
        files: (size in bytes, SHA-256) by path within the folder.
    """

    step: int
    score: float | None
    files: dict[str, tuple[int, str]]


def save_checkpoint(folder: Path, step: int, score: float | None, write: Callable[[Path], None]) -> Path:
    """Create ``folder/step_K`` with the files that ``write`` writes into the folder it is called with.

    Raises:
        CheckpointError: the disk is full or not writable; earlier checkpoints are unchanged.
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
        if target.exists():  # a damaged one; a run resumes after a complete one
            target.rename(folder / f".step_{step}.old.partial")
        partial.rename(target)
        _sync(folder)
    except Exception as error:
        reason = _find_disk_fault(error, folder)
        shutil.rmtree(partial, ignore_errors=True)
        if reason is None:
            raise
        raise CheckpointError(
            f"{target}: cannot be saved ({reason}); earlier checkpoints are intact: free disk space and resume"
        ) from error
    _remove_partial(folder)
    return target


def find_newest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint; log a warning for each newer one that is damaged."""
    for path in reversed(_list_checkpoints(folder)):
        fault = verify_checkpoint(path)
        if fault is None:
            return path
        logger.warning(f"{path} is damaged ({fault}); trying the checkpoint before it")
    return None


def verify_checkpoint(checkpoint: Path) -> str | None:
    """Compare a checkpoint's files with its manifest; return the first difference, or None."""
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
                return f"{name} has another checksum"
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
    """Remove all but the newest ``save_total_limit`` and the best ``save_best_limit``; the newer wins a tie."""
    scores: dict[int, float | None] = {}
    for path in _list_checkpoints(folder):
        try:
            scores[_read_step(path)] = read_manifest(path).score
        except (OSError, ValueError, TypeError, KeyError):
            continue  # keep damaged checkpoints
    for step in scores.keys() - select_kept(scores, save_total_limit, save_best_limit):
        # Rename first, so that no incomplete folder has a checkpoint's name.
        (folder / f"step_{step}").rename(folder / f".step_{step}.partial")
    _remove_partial(folder)


def _list_checkpoints(folder: Path) -> list[Path]:
    """List checkpoints, complete or not, oldest first."""
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
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_partial(folder: Path) -> None:
    for path in folder.glob(".step_*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def _find_disk_fault(error: Exception, folder: Path) -> str | None:
    """Return the reason if the disk caused the error; safetensors and torch wrap the ``OSError`` in other types."""
    text = " ".join(str(error).split())
    if not (isinstance(error, OSError) or type(error).__name__ == "SafetensorError" or "inline_container" in text):
        return None
    existing = next(path for path in [folder, *folder.parents] if path.exists())
    return "no space left on the disk" if shutil.disk_usage(existing).free < 2**20 else text
