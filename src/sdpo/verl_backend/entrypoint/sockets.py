"""The sockets through which weights go to vLLM: verl names them by Ray's job, so two Rays on a machine share them.

The number of a Ray's first job is the same in every Ray (``01000000``), and whoever comes second takes the file of the
first away: ``verl/workers/rollout/vllm_rollout/vllm_rollout.py`` and ``bucketed_weight_transfer.py`` in verl 0.9.1.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path
from typing import IO

from sdpo.errors import ConfigError


def claim_sockets(job_id: str) -> IO[str]:
    """Take the names of this job's sockets on this machine, until the file that is returned is closed.

    Raises:
        ConfigError: another run of this user has them.
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
            f"another run on verl uses this machine (process {owner}), and both would hand their weights to vLLM "
            f"through the same sockets, /tmp/rl-colocate-zmq-{job_id}-*; wait for its end, or start both in one Ray: "
            "'ray start --head', and RAY_ADDRESS=auto for each"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
