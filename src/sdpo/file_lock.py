"""An exclusive lock on a file that names its owner; it ends with the process, whatever ends the process."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO


class FileLocked(Exception):
    """Another process has the lock; the message is what that process wrote about itself."""


def lock_file(path: Path, owner: str) -> IO[str]:
    """Lock a file, created if needed, until the returned file is closed; ``owner`` becomes its content.

    Raises:
        FileLocked: another process has the lock.
        OSError: the file cannot be opened or locked.
    """
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        with file:
            raise FileLocked(file.read().strip()) from None
    except OSError:
        file.close()
        raise
    file.truncate(0)
    file.write(f"{owner}\n")
    file.flush()
    return file


def is_locked(path: Path) -> bool:
    """Whether another process has the lock; false for a missing file, and where locks do not exist."""
    try:
        with path.open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
