"""A lock for the sockets of the weight sync to vLLM: verl names them by Ray's job id, which two Rays share.

The first job of every Ray has the id ``01000000``, and a second run replaces the first run's socket files. verl added
the job id after https://github.com/verl-project/verl/issues/6233; two separate Rays on one machine still collide.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path
from typing import IO

from sdpo.errors import ConfigError


def claim_sockets(job_id: str) -> IO[str]:
    """Lock the names of this job's sockets on this machine until the returned file is closed.

    Raises:
        ConfigError: another run of this user has the lock.
    """
    path = Path(tempfile.gettempdir()) / f"sdpo-verl-{os.getuid()}-{job_id}.lock"
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise ConfigError(
            f"another run on verl uses this machine (process {owner}), and both would sync weights to vLLM through the "
            f"same sockets, /tmp/rl-colocate-zmq-{job_id}-*; wait for its end, or start both in one Ray: "
            "'ray start --head', and RAY_ADDRESS=auto for each"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
