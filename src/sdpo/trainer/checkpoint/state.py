"""What a checkpoint holds so that training goes on as if it had never stopped, and how it gets there and back.

step_K/                     the student in the Hugging Face format, or its adapters in PEFT's; tokenizer or processor
step_K/teacher/             the teacher, where it has weights of its own; with adapters it is among everything else
step_K/training_state.pt    everything else, below
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from sdpo.config.root import SDPOConfig
from sdpo.errors import CheckpointError
from sdpo.models.generation.sampling import Completion
from sdpo.models.loading import load_model
from sdpo.models.lora.adapters import add_adapters, get_adapted_layers, load_adapter, save_adapter
from sdpo.trainer.actor.actor import Actor
from sdpo.trainer.data.prompts import Prompt
from sdpo.trainer.rollout.base import RolloutBatch

FILE = "training_state.pt"


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands after step ``actor["version"]``.

    Attributes:
        actor: see ``Actor.state_dict``.
        health_callback: see ``HealthCallback.state_dict``.
        row: the step's metrics so far.
        health_checked: whether it has been evaluated, if that is due, and the alarms have seen it.
        rollouts: of the next step where they have been sampled already, by older weights; else None.
        data: what the training rows come to (``compute_fingerprint``).
        random: states of the generators of torch, numpy and Python, of which a task may draw.
    """

    actor: dict[str, Any]
    health_callback: dict[str, Any]
    row: dict[str, float]
    health_checked: bool
    rollouts: RolloutBatch | None
    data: str
    random: dict[str, Any] = field(default_factory=lambda: get_random_states())

    def save(self, folder: Path) -> None:
        content = {
            name: getattr(self, name)
            for name in ("actor", "health_callback", "row", "health_checked", "data", "random")
        }
        torch.save({**content, "rollouts": asdict(self.rollouts) if self.rollouts else None}, folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> TrainingState:
        try:
            content: dict[str, Any] = torch.load(folder / FILE, map_location="cpu", weights_only=True)
            return cls(**{**content, "rollouts": _to_rollouts(content["rollouts"])})
        except Exception as error:  # unpickling raises whatever it meets
            raise CheckpointError(
                f"{folder / FILE}: was written by another version ({type(error).__name__})"
            ) from error


def save_models(folder: Path, actor: Actor, processing: PreTrainedTokenizerBase | ProcessorMixin) -> None:
    """Student and teacher, as ``from_pretrained`` loads them; of a student with adapters these alone, as PEFT does."""
    processing.save_pretrained(folder)
    if get_adapted_layers(actor.student):
        save_adapter(actor.student, folder)
        return
    actor.student.save_pretrained(folder)
    if actor.teacher is not None and actor.teacher.module is not None:
        actor.teacher.module.save_pretrained(folder / "teacher")  # type: ignore[operator]


def load_student(run: SDPOConfig, checkpoint: Path | None, device: torch.device) -> PreTrainedModel:
    """The run's student as a checkpoint has it, or as it begins; with its adapters, if the run has any."""
    if not run.lora.rank:
        return load_model(run.model if checkpoint is None else replace(run.model, path=str(checkpoint)), device)
    student = load_model(run.model, device)
    add_adapters(student, run.lora)
    if checkpoint is not None:
        load_adapter(student, checkpoint)
    return student


def load_teacher_module(run: SDPOConfig, checkpoint: Path, device: torch.device) -> PreTrainedModel:
    """The teacher's weights where the checkpoint has a model of them."""
    return load_model(replace(run.model, path=str(checkpoint / "teacher")), device)


def compute_fingerprint(prompts: Sequence[Prompt]) -> str:
    """The same for the same token ids in the same order, and practically never else."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(repr((prompt.token_ids, prompt.row.ground_truth)).encode())
    return digest.hexdigest()


def get_random_states() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    for device, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
        torch.cuda.set_rng_state(state, device)
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


def _to_rollouts(content: Mapping[str, Any] | None) -> RolloutBatch | None:
    if content is None:
        return None
    responses = [[Completion(**response) for response in of_prompt] for of_prompt in content["responses"]]
    return RolloutBatch(responses, content["policy_version"], content["seconds"])
