"""Weight sync through a file in shared memory, in place of NCCL."""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch
from verl.checkpoint_engine import CheckpointEngine, CheckpointEngineRegistry
from verl.workers.rollout.utils import ensure_async_iterator

# verl imports this module in every process that needs these registrations.
import sdpo.verl_backend.cpu.engine
import sdpo.verl_backend.cpu.rollout  # noqa: F401

BACKEND = "shared_file"


def _folder() -> Path:
    shared = Path("/dev/shm")
    return shared if shared.is_dir() else Path(tempfile.gettempdir())


@CheckpointEngineRegistry.register(BACKEND)
class SharedFileEngine(CheckpointEngine):  # type: ignore[misc]
    """Rank 0 writes a file, every sampler of the same machine reads it, rank 0 deletes it."""

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self.is_master = is_master
        self.path = Path()

    def prepare(self) -> dict[str, Any]:
        return {"path": str(_folder() / f"sdpo-weights-{uuid.uuid4().hex}.pt")} if self.is_master else {}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        path = metadata[0]["path"]
        return {"path": [path] * actor_wg_world_size}, {"path": [path] * rollout_world_size}

    def init_process_group(self, path: str) -> None:
        self.path = Path(path)

    def finalize(self) -> None:
        if self.is_master:
            self.path.unlink(missing_ok=True)

    async def send_weights(self, weights: Any, global_steps: int | None = None) -> dict[str, float]:
        # All ranks gather each tensor; only the first rank writes them.
        state = {name: tensor.detach().clone() async for name, tensor in ensure_async_iterator(weights)}
        if self.is_master:
            partial = self.path.with_suffix(".partial")
            torch.save(state, partial)
            partial.rename(self.path)
        return {}

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        while not self.path.exists():
            await asyncio.sleep(0.01)
        for name, tensor in torch.load(self.path).items():
            yield name, tensor
