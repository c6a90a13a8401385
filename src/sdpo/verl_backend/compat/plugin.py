"""Entry point of the group ``verl.plugins``: registers the CPU platform in every process.

verl loads it on ``import verl`` and logs a failure at DEBUG only, so ``entrypoint/main.py`` checks the result. Engine,
trainers and workers need no registration here, since ``entrypoint/runners.py`` passes the classes to verl.
"""

from __future__ import annotations

import os

import sdpo.verl_backend.cpu.platform  # noqa: F401

if os.environ.get("VERL_PLATFORM") == "cpu":
    from sdpo.verl_backend.cpu.processor import fall_back_without_torchvision

    fall_back_without_torchvision()
