"""What every test needs: one thread a process, no network, and no CUDA where there is none, nor Triton's compiler."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Read when torch is first imported, here and in the processes that tests start; importing torch now to say the same
# would cost seconds in tests that do without it.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Triton has to know before it is first imported that its kernels are to be interpreted.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not for_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in for_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
