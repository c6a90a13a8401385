"""Content of a checkpoint: models and training state, so that a resumed run is bit-for-bit identical.

step_K/                     student in the Hugging Face format, or its LoRA adapters in PEFT's; tokenizer or processor
step_K/teacher/             teacher, if its weights are stored as a model; with LoRA they are in the training state
step_K/training_state.pt    ``TrainingState``
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from sdpo.config.model import LoraConfig, ModelConfig
from sdpo.errors import CheckpointError
from sdpo.models.generation.sampling import Completion
from sdpo.models.loading import load_model
from sdpo.models.lora.adapters import add_adapters, get_adapted_layers, load_adapter, save_adapter
from sdpo.models.saving import save_model
from sdpo.prompting.run_date import RUN_DATE
from sdpo.trainer.actor.actor import Actor
from sdpo.trainer.data.prompts import Prompt
from sdpo.trainer.rollout.base import RolloutBatch

FILE = "training_state.pt"


@dataclass(frozen=True)
class TrainingState:
    """State of a run after step ``actor["version"]``.

    Attributes:
        actor: see ``Actor.state_dict``.
        health_callback: see ``HealthCallback.state_dict``.
        row: metrics of the step so far.
        health_checked: whether the validation, if due, and the health checks of the step are done.
        rollouts: of the next step, if they are sampled before this step's update; else None.
        data: fingerprints of what the run was trained on (``compute_fingerprints``).
        best_weights: see ``ActorHealthActions.best_weights``.
        random: states of the generators of torch, numpy and Python; tasks may use them.
        date: at which the run began, for chat templates that write it; empty in older checkpoints.
    """

    actor: dict[str, Any]
    health_callback: dict[str, Any]
    row: dict[str, float]
    health_checked: bool
    rollouts: RolloutBatch | None
    data: dict[str, str]
    best_weights: dict[str, torch.Tensor] | None = None
    random: dict[str, Any] = field(default_factory=lambda: get_random_states())
    date: str = field(default_factory=lambda: os.environ.get(RUN_DATE, ""))

    def save(self, folder: Path) -> None:
        content = {
            name: getattr(self, name)
            for name in ("actor", "health_callback", "row", "health_checked", "data", "best_weights", "random", "date")
        }
        torch.save({**content, "rollouts": asdict(self.rollouts) if self.rollouts else None}, folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> TrainingState:
        try:
            content: dict[str, Any] = torch.load(folder / FILE, map_location="cpu", weights_only=True)
            return cls(**{"date": "", **content, "rollouts": _to_rollouts(content["rollouts"])})
        except Exception as error:  # unpickling may raise anything
            raise CheckpointError(
                f"{folder / FILE}: cannot be read by this version ({type(error).__name__}); "
                "resume with the version that wrote it"
            ) from error


def save_models(folder: Path, actor: Actor, processing: PreTrainedTokenizerBase | ProcessorMixin) -> None:
    """Save student and teacher for ``from_pretrained``; of a student with LoRA, the adapters only, for PEFT."""
    processing.save_pretrained(folder)
    if get_adapted_layers(actor.student):
        save_adapter(actor.student, folder)
        return
    save_model(actor.student, folder)
    if actor.teacher is not None and actor.teacher.module is not None:
        save_model(actor.teacher.module, folder / "teacher")


def load_student(
    config: ModelConfig, lora: LoraConfig, checkpoint: Path | None, device: torch.device
) -> PreTrainedModel:
    """Load the student of a checkpoint, or the initial one if it is None; with LoRA adapters if ``lora.rank`` > 0."""
    if not lora.rank:
        return load_model(config if checkpoint is None else replace(config, path=str(checkpoint)), device)
    student = load_model(config, device)
    add_adapters(student, lora)
    if checkpoint is not None:
        load_adapter(student, checkpoint)
    return student


def load_teacher_module(config: ModelConfig, checkpoint: Path, device: torch.device) -> PreTrainedModel:
    """Load the teacher of a checkpoint that stores it as a model."""
    return load_model(replace(config, path=str(checkpoint / "teacher")), device)


def compute_fingerprints(prompts: Sequence[Prompt], task: str, base: nn.Module | None) -> dict[str, str]:
    """Hash what prompts, scores and the model are made of, by what to name if it changes.

    Args:
        prompts: of training, in their order.
        task: name, module or file of the reward function.
        base: a module that is loaded from ``model.path`` on resume; None if there is none.
    """
    rows, images = hashlib.sha256(), hashlib.sha256()
    for prompt in prompts:
        row = prompt.row
        fields = (prompt.token_ids, prompt.solution, row.data_source, row.ability, row.reward_model, row.extra_info)
        rows.update(json.dumps(fields, sort_keys=True, default=repr).encode("utf-8", "backslashreplace"))
        for image in prompt.images:
            images.update(hashlib.sha256(image).digest())
    code = Path(task).read_bytes() if task.endswith(".py") else task.encode()
    found = {
        "the rows of data.train_files": rows.hexdigest(),
        "the images of data.train_files": images.hexdigest(),
        "the reward function in data.task": hashlib.sha256(code).hexdigest(),
    }
    if base is not None:
        found["the weights in model.path"] = _hash_weights(base)
    return found


def _hash_weights(model: nn.Module) -> str:
    """Hash names, shapes and sums of a model's frozen weights, as integers, and some of their values."""
    digest = hashlib.sha256()
    for name, param in model.named_parameters():
        if not param.requires_grad:
            bits = param.detach().contiguous().view(torch.int32 if param.element_size() == 4 else torch.int16)
            some = bits.flatten()[:: max(bits.numel() // 1024, 1)].tolist()
            digest.update(repr((name, tuple(param.shape), str(param.dtype), int(bits.sum()), some)).encode())
    return digest.hexdigest()


def get_random_states() -> dict[str, Any]:
    """Return the states of all global random generators, as ``torch.save`` stores them."""
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
    responses = [[Completion(**response) for response in group] for group in content["responses"]]
    return RolloutBatch(responses, content["policy_version"], content["seconds"])
