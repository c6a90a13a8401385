"""The output folder of a run, on both backends: locked while a run writes to it; an earlier run is moved aside."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path
from typing import IO

from sdpo.errors import ConfigError
from sdpo.file_lock import FileLocked, lock_file

CONFIG_FILE = "run.yaml"  # marks the folder as one of a run
LOCK_FILE = ".lock"


def require_idle(path: Path) -> None:
    """Check that no other run is writing to the folder.

    Raises:
        ConfigError: another run is writing to it; the message names its process.
    """
    if (path / LOCK_FILE).is_file():
        with contextlib.suppress(OSError):  # opening the run folder reports it
            lock_folder(path).close()


def lock_folder(path: Path) -> IO[str]:
    """Lock the folder until the returned file is closed or the process ends.

    Raises:
        ConfigError: see ``require_idle``.
        OSError: the folder cannot be written, or its file system has no locks.
    """
    try:
        return lock_file(path / LOCK_FILE, f"process {os.getpid()} on {platform.node()}")
    except FileLocked as owner:
        raise ConfigError(
            f"output_dir={path}: another run is writing to it ({owner}); wait for it, stop it, or name another folder"
        ) from None


def move_earlier_run(path: Path) -> Path | None:
    """Move an earlier run in the folder aside, and return its new folder; None if there is none.

    Raises:
        ConfigError: the folder contains something else.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    if not (path / CONFIG_FILE).is_file():
        raise ConfigError(f"output_dir={path}: exists and is no run folder; name another folder")
    number = 1
    while path.with_name(f"{path.name}.{number}").exists():
        number += 1
    moved = path.with_name(f"{path.name}.{number}")
    path.rename(moved)
    return moved
