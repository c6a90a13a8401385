"""The teacher of one rank, sharded by FSDP2 like the student: build, offload, save, load, forward pass."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from verl.trainer.config import CheckpointConfig
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager
from verl.utils.fsdp_utils import load_fsdp_model_to_gpu, offload_fsdp_model_to_cpu

from sdpo.algorithm.teacher import Teacher
from sdpo.algorithm.teacher_weights import get_shards
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.kernels.chunked_log_probs import LinearHead
from sdpo.verl_backend.worker.lora import ShardedDeltas, SharedTeacher, build_lora_teacher
from sdpo.verl_backend.worker.output_head import compute_at_head

SUMMARY_FILE = "teacher.json"


@dataclass(frozen=True)
class TeacherHead:
    """Output head of one model in the teacher's mixture, usable after the forward pass."""

    head: LinearHead
    uses_student_weight: bool

    def resolve(self, student: LinearHead) -> LinearHead:
        """Return the head with a gathered weight: its own copy, or the weight that the student's forward pass holds."""
        if not self.uses_student_weight:
            return self.head
        return replace(self.head, weight=student.weight, bias=student.bias)


class TeacherEngine:
    """``Teacher`` on one rank.

    Its own weights are a sharded module, or LoRA deltas, or none (live teacher; LoRA with the reference model as
    teacher).

    Args:
        student: under FSDP2, with LoRA in PEFT's wrapper.
        config: the teacher's kind and rate.
        build_module: builds a sharded model with the initial weights, without gradients; all ranks must call it.
        processor: saved by verl's checkpoint manager with the module's shards.
        mask_head: excludes tokens that are never sampled from a head.
        autocast: returns the context of a forward pass.
        is_lora: whether the student has adapters.
        offloads: whether weights are on the host between updates.

    Attributes:
        module: the sharded module; None if there is none.
        deltas: the LoRA deltas; None if there are none.
    """

    def __init__(
        self,
        student: nn.Module,
        config: SelfDistillationConfig,
        *,
        build_module: Callable[[], nn.Module],
        processor: Any,
        mask_head: Callable[[LinearHead], LinearHead],
        autocast: Callable[[], contextlib.AbstractContextManager[Any]],
        is_lora: bool,
        offloads: bool,
    ) -> None:
        self.student = student
        self.config = config
        self.module: nn.Module | None = None
        self.deltas: ShardedDeltas | None = None
        self._build_module = build_module
        self._mask_head = mask_head
        self._autocast = autocast
        self._is_lora = is_lora
        self._offloads = offloads
        self._checkpoints: FSDPCheckpointManager | None = None
        # This rank's shards of the student at its best evaluation, on the host; only with a live teacher.
        self._best_student: dict[str, Tensor] | None = None
        if is_lora:
            self.teacher = build_lora_teacher(student, config)
            weights = self.teacher.weights
            self.deltas = weights if isinstance(weights, ShardedDeltas) else None
            return
        if config.teacher_regularization != "live":
            self.module = build_module()
            self._checkpoints = FSDPCheckpointManager(
                model=self.module,
                processing_class=processor,
                checkpoint_config=CheckpointConfig(save_contents=["model"], load_contents=["model"]),
            )
        self.teacher = Teacher(self.module, config)

    def step(self) -> None:
        """Update the teacher's shards from the student's, once per rollout batch."""
        self.teacher.update(self.student)

    def to(self, device: str) -> None:
        """Move the teacher's own weights to the host (``cpu``) or to the device."""
        if self.deltas is not None:
            self.deltas.to(device)
        if self.module is not None:
            (offload_fsdp_model_to_cpu if device == "cpu" else load_fsdp_model_to_gpu)(self.module)

    # Forward pass

    @torch.no_grad()
    def forward(self, inputs: dict[str, Any], rows: Tensor) -> list[TeacherHead]:
        """Return the output heads whose logits [M, V] the teacher's distribution mixes.

        Args:
            inputs: of the forward pass.
            rows: [M] rows of the packed hidden states.
        """
        heads = []
        for module, coefficient in self.teacher.policy(self.student):
            is_shared = module.get_output_embeddings() is self.student.get_output_embeddings()  # type: ignore[operator]
            keep = partial(self._keep_head, coefficient=coefficient, with_weight=not is_shared)
            with self._autocast():
                heads.append(TeacherHead(compute_at_head(module, inputs, rows, keep), is_shared))
            for each in module.modules():
                if isinstance(each, FSDPModule):
                    each.reshard()  # ``Teacher.update`` reads shards, which gathered weights would hide
        return heads

    def _keep_head(self, head: LinearHead, coefficient: float, with_weight: bool) -> LinearHead:
        """Copy the gathered weight if needed: FSDP2 frees it after the forward pass."""
        kept = replace(self._mask_head(head), coefficient=coefficient)
        if with_weight:
            kept = replace(kept, weight=kept.weight.clone(), bias=None if kept.bias is None else kept.bias.clone())
        return kept

    # Freezing

    @torch.no_grad()
    def snapshot_best(self) -> None:
        """Copy the student's trained shards to the host, for ``freeze``."""
        self._best_student = {name: shard.cpu().clone() for name, shard in self._get_trained_shards().items()}

    @torch.no_grad()
    def freeze(self) -> None:
        """Stop following the student. With a live teacher, restore the student of the best evaluation, if known.

        The live teacher becomes the reference model, which is loaded again: every rank must call this.
        """
        if self._best_student is not None:
            for name, shard in self._get_trained_shards().items():
                shard.copy_(self._best_student[name])
            self._best_student = None
        self._freeze_teacher()

    def _freeze_teacher(self) -> None:
        if self._is_frozen:
            return
        initial: nn.Module | None = None
        if self.teacher.module is None and self._is_lora:
            initial = SharedTeacher(self.student, None)
        elif self.teacher.module is None:
            initial = self.module = self._build_module()
            if self._offloads:
                offload_fsdp_model_to_cpu(initial)
        self.teacher.freeze(initial)

    @property
    def _is_frozen(self) -> bool:
        """Whether a health action has frozen the teacher."""
        return self.teacher.kind != self.config.teacher_regularization

    def _get_trained_shards(self) -> dict[str, Tensor]:
        shards = get_shards(self.student)
        return {name: shards[name] for name, param in self.student.named_parameters() if param.requires_grad}

    # Checkpoints

    def save(self, folder: Path) -> None:
        """Write this rank's part of the teacher; rank 0 also writes a readable summary."""
        folder.mkdir(exist_ok=True)
        state = self.teacher.state_dict()
        torch.save(state, folder / _name_shard_file("state"))
        if self._checkpoints is not None:
            self._checkpoints.save_checkpoint(str(folder))
        if self._best_student is not None:
            torch.save(self._best_student, folder / _name_shard_file("best"))
        if dist.get_rank() == 0:
            summary = {"kind": self.config.teacher_regularization, "num_steps": state["num_steps"]}
            (folder / SUMMARY_FILE).write_text(json.dumps(summary), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Load what ``save`` wrote.

        Raises:
            RuntimeError: the folder holds no teacher, or a teacher of another kind.
        """
        summary = folder / SUMMARY_FILE
        saved_kind = json.loads(summary.read_text(encoding="utf-8"))["kind"] if summary.is_file() else "no"
        kind = self.config.teacher_regularization
        if saved_kind != kind:
            raise RuntimeError(
                f"actor_rollout_ref.actor.self_distillation.teacher_regularization={kind}: the checkpoint in "
                f"{folder.parent} holds {saved_kind} teacher; set it to the value of the run that saved it"
            )
        state = torch.load(folder / _name_shard_file("state"), map_location="cpu", weights_only=True)
        if self._checkpoints is not None:
            self._checkpoints.load_checkpoint(str(folder))
        self.teacher.load_state_dict(state)
        if state["kind"] != kind:
            self._freeze_teacher()
        best = folder / _name_shard_file("best")
        if best.is_file():
            self._best_student = torch.load(best, map_location="cpu", weights_only=True)


def _name_shard_file(content: str) -> str:
    """Name this rank's file as verl names its own files of shards."""
    return f"{content}_world_size_{dist.get_world_size()}_rank_{dist.get_rank()}.pt"
