"""Two runs on one machine cannot use the same sockets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sdpo.errors import SDPOError
from sdpo.verl_backend.entrypoint.sockets import claim_sockets

OTHER = """
import sys, tempfile
tempfile.tempdir = sys.argv[1]
from sdpo.verl_backend.entrypoint.sockets import claim_sockets
claimed = claim_sockets(sys.argv[2])
print("claimed", flush=True)
sys.stdin.read()
"""


def test_second_run_with_the_same_job_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    command = [sys.executable, "-c", OTHER, str(tmp_path), "01000000"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "claimed\n"
        with pytest.raises(SDPOError, match=rf"another run on verl uses this machine \(process {other.pid}\)"):
            claim_sockets("01000000")
        claim_sockets("02000000").close()  # another job of the same Ray
        other.kill()
    claim_sockets("01000000").close()
