"""Shared test setup: one thread per process, no network, Triton's interpreter and no GPU tests without a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# torch reads these variables when it is first imported, also in processes that tests start. An import of torch here
# would take seconds in tests that do not use torch.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Triton reads this variable when it is first imported.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# Modules whose functions declare shapes; of the kernels, those that other packages call. The hook imports none of them.
# With it a call with another shape raises jaxtyping.TypeCheckError.
CHECKED_MODULES = [
    "sdpo.algorithm.advantage",
    "sdpo.algorithm.aggregation",
    "sdpo.algorithm.batch",
    "sdpo.algorithm.distillation",
    "sdpo.algorithm.distributions",
    "sdpo.algorithm.divergence",
    "sdpo.algorithm.importance_sampling",
    "sdpo.algorithm.loss",
    "sdpo.algorithm.official",
    "sdpo.algorithm.regularization",
    "sdpo.algorithm.topk",
    "sdpo.kernels.chunked_log_probs",
    "sdpo.kernels.dispatch",
    "sdpo.kernels.fused_linear_loss",
    "sdpo.kernels.fused_self_distillation",
]
install_import_hook(CHECKED_MODULES, "beartype.beartype")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
