"""Two runs on one machine cannot use the same sockets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from sdpo.errors import SDPOError
from sdpo.verl_backend.entrypoint import runners
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


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
@pytest.mark.parametrize("trainer", ["one_step_off", "v1"])
def test_runners_claim_the_sockets_of_vllm_while_they_train(
    trainer: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed, held = object(), []
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_job_id=lambda: "03000000"))
    monkeypatch.setattr(
        "sdpo.verl_backend.entrypoint.sockets.claim_sockets", lambda job: claimed if job == "03000000" else None
    )
    runner = object.__new__(getattr(runners, f"build_{trainer}_runner")().__ray_metadata__.modified_class)
    monkeypatch.setattr(runners, f"train_{trainer}", lambda config: held.append(runner.sockets))
    runner.run(OmegaConf.create({"actor_rollout_ref": {"rollout": {"name": engine}}}))
    assert held == [claimed if engine == "vllm" else None]
