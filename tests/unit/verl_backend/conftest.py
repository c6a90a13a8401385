"""Training steps on verl's engine in separate processes: gloo ranks, FSDP2, no Ray."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sdpo.models.multimodal.vision_tower import VisionAdapter
from sdpo.trainer.data.samples import TrainingSample

SCRIPT = Path(__file__).with_name("train_cases.py")
SOURCE = Path(__file__).parents[3] / "src"

TrainOnVerl = Callable[[dict[str, dict[str, Any]], int], dict[str, Any]]


if importlib.util.find_spec("verl") is None:  # sdpo[verl] is not installed
    collect_ignore_glob = ["test_*.py"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def assert_same_after_adamw() -> Callable[..., None]:
    """Compare the weights of both backends after a few steps.

    AdamW normalizes gradients: where a gradient is only rounding error, the backends take different steps.
    So 3% of a tensor's entries may differ, by at most a tenth of the learning rate.
    """

    def check(actual: torch.Tensor, expected: torch.Tensor, *, rtol: float, atol: float, lr: float, msg: str) -> None:
        difference = (actual - expected).abs()
        off = difference > atol + rtol * expected.abs()
        assert float(off.float().mean()) <= 0.03, f"{msg}: {int(off.sum())} of {off.numel()} entries are off"
        assert float(difference.max()) <= 0.1 * lr + atol + rtol * float(expected.abs().max()), msg

    return check


@pytest.fixture(scope="session")
def train_on_verl(tmp_path_factory: pytest.TempPathFactory) -> TrainOnVerl:
    """Run cases (see ``train_cases.py``) on this many ranks; return the first rank's results by the case's name."""

    def train(cases: dict[str, dict[str, Any]], world_size: int) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("verl")
        torch.save(cases, folder / "cases.pt")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")]),
            "VERL_PLATFORM": "cpu",
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        ranks = [
            subprocess.Popen(
                [sys.executable, str(SCRIPT), str(folder / "cases.pt"), str(folder / "results.pt")],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=(folder / f"rank{rank}.log").open("w"),
                stderr=subprocess.STDOUT,
            )
            for rank in range(world_size)
        ]
        codes = [process.wait(timeout=600) for process in ranks]
        logs = "\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(world_size))
        assert codes == [0] * world_size, logs
        return torch.load(folder / "results.pt", weights_only=False)

    return train


@pytest.fixture(scope="session")
def pad_for_verl() -> Callable[..., dict[str, torch.Tensor]]:
    """Pad samples as on verl's driver: prompts on the left, responses on the right."""

    def pad(
        samples: Sequence[TrainingSample],
        old_log_probs: Sequence[torch.Tensor],
        threshold: float | None,
        vision: VisionAdapter | None = None,
    ) -> dict[str, Any]:
        size = len(samples)
        prompt_length = max(len(s.prompt.token_ids) for s in samples)
        length = max(len(s.response.token_ids) for s in samples)
        teacher_length = max(max(len(s.teacher_prompt.token_ids or ()) for s in samples), 1)
        batch = {
            "input_ids": torch.zeros(size, prompt_length + length, dtype=torch.long),
            "attention_mask": torch.zeros(size, prompt_length + length, dtype=torch.long),
            "prompts": torch.zeros(size, prompt_length, dtype=torch.long),
            "responses": torch.zeros(size, length, dtype=torch.long),
            "response_mask": torch.zeros(size, length, dtype=torch.long),
            "old_log_probs": torch.zeros(size, length),
            "rollout_log_probs": torch.zeros(size, length),
            "advantages": torch.zeros(size, length),
            "teacher_prompts": torch.zeros(size, teacher_length, dtype=torch.long),
            "teacher_prompt_lengths": torch.zeros(size, dtype=torch.long),
            "distillation_sample_weights": torch.tensor([s.distillation_weight for s in samples]),
            "distillation_coef": torch.ones(size),
        }
        for i, (sample, old) in enumerate(zip(samples, old_log_probs, strict=True)):
            prompt, response = sample.prompt.token_ids, sample.response.token_ids
            start, end = prompt_length - len(prompt), prompt_length + len(response)
            batch["input_ids"][i, start:end] = torch.tensor([*prompt, *response])
            batch["attention_mask"][i, start:end] = 1
            batch["response_mask"][i, : len(response)] = 1
            batch["old_log_probs"][i, : len(response)] = old
            batch["rollout_log_probs"][i, : len(response)] = torch.tensor(sample.response.log_probs)
            batch["advantages"][i, : len(response)] = sample.advantage
            if sample.is_distilled:
                ids = torch.tensor(sample.teacher_prompt.token_ids)
                batch["teacher_prompts"][i, : len(ids)] = ids
                batch["teacher_prompt_lengths"][i] = len(ids)
        batch["prompts"] = batch["input_ids"][:, :prompt_length].clone()
        batch["responses"] = batch["input_ids"][:, prompt_length:].clone()
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        if vision is not None:
            batch["position_ids"] = place_in_images(batch["position_ids"], samples, prompt_length, vision)
            batch["multi_modal_inputs"] = [read_pixels(sample, vision) for sample in samples]
        if threshold is not None:
            ratio = (batch["old_log_probs"] - batch["rollout_log_probs"]).exp().clamp(max=threshold)
            batch["rollout_is_weights"] = ratio * batch["response_mask"]
        return batch

    return pad


def place_in_images(
    text: torch.Tensor, samples: Sequence[TrainingSample], prompt_length: int, vision: VisionAdapter
) -> torch.Tensor:
    """Return position ids [B, 4, L] as in verl's agent loop: position in the text, then time, height and width."""
    positions = text[:, None].repeat(1, 1 + vision.num_axes, 1)
    for i, sample in enumerate(samples):
        if sample.prompt.images:
            own = vision.compute_positions(sample.prompt.tokens)
            positions[i, 1:, prompt_length - own.shape[1] : prompt_length] = own
            positions[i, 1:, prompt_length:] += own.max() + 1 - own.shape[1]
    return positions


def read_pixels(sample: TrainingSample, vision: VisionAdapter) -> dict[str, torch.Tensor]:
    pixels = [vision.reader.read_pixels(image) for image in sample.prompt.images]
    inputs = {name: torch.cat([each[name] for each in pixels]) for name in (pixels[0] if pixels else ())}
    if inputs:
        inputs["images_seqlens"] = inputs["image_grid_thw"].prod(1)  # as verl's agent loop adds them
    return inputs
