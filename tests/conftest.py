"""Shared test setup: one thread per process, no network, Triton's interpreter and no GPU tests without a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# torch reads these variables when it is first imported, also in processes that tests start. An import of torch here
# would take seconds in tests that do not use torch.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Triton reads this variable when it is first imported.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
