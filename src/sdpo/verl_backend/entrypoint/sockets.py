"""A lock for the sockets of the weight sync to vLLM: verl names them by Ray's job id, which two Rays share.

The first job of every Ray has the id ``01000000``, and a second run replaces the first run's socket files. verl added
the job id after https://github.com/verl-project/verl/issues/6233; two separate Rays on one machine still collide.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO

from sdpo.errors import ConfigError
from sdpo.file_lock import FileLocked, lock_file


def claim_sockets(job_id: str) -> IO[str]:
    """Lock the names of this job's sockets on this machine until the returned file is closed.

    Raises:
        ConfigError: another run of this user has the lock.
    """
    path = Path(tempfile.gettempdir()) / f"sdpo-verl-{os.getuid()}-{job_id}.lock"
    try:
        return lock_file(path, f"process {os.getpid()}")
    except FileLocked as owner:
        raise ConfigError(
            f"another run on verl uses this machine ({owner}), and both would sync weights to vLLM through the "
            f"same sockets, /tmp/rl-colocate-zmq-{job_id}-*; wait for its end, or start both in one Ray: "
            "'ray start --head', and RAY_ADDRESS=auto for each"
        ) from None
