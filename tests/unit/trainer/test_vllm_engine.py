"""Checks that run before vLLM is imported; ``tests/vllm`` tests the engine itself."""

from __future__ import annotations

import pytest
import torch

from sdpo import SDPOError
from sdpo.trainer.rollout import vllm_engine
from sdpo.trainer.rollout.vllm_engine import require_vllm


@pytest.mark.parametrize(
    ("device", "command"),
    [("cpu", "pip install --no-deps -r requirements-vllm.txt"), ("cuda:0", "pip install vllm")],
)
def test_error_without_vllm_has_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, device: str, command: str
) -> None:
    monkeypatch.setattr(vllm_engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SDPOError) as error:
        require_vllm(torch.device(device))
    assert str(error.value) == f"rollout.engine=vllm: vLLM is not installed; install it with: {command}"


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_device_that_vllm_cannot_use_is_refused(device: str) -> None:
    with pytest.raises(SDPOError, match=rf"^rollout\.device={device}: .* on cpu or on the first visible GPU only; "):
        require_vllm(torch.device(device))
