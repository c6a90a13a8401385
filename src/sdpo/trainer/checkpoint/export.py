"""Export of a checkpoint's student or teacher as a plain model folder."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sdpo.config.loader import load_config
from sdpo.config.model import LoraConfig, ModelConfig
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.errors import CheckpointError
from sdpo.models.loading import load_model, load_tokenizer
from sdpo.models.lora.adapters import merge_adapters
from sdpo.models.multimodal.processor import load_reader
from sdpo.models.saving import save_model
from sdpo.observability.run_folder import CONFIG_FILE
from sdpo.trainer.checkpoint.manager import verify_checkpoint
from sdpo.trainer.checkpoint.state import TrainingState, load_student, load_teacher_module

CPU = torch.device("cpu")


def export_model(checkpoint: Path, out: Path, *, teacher: bool = False) -> None:
    """Write a model for ``from_pretrained``, with LoRA adapters merged and its tokenizer or processor.

    Args:
        checkpoint: ``step_K`` in the output folder of a run; the ``run.yaml`` there is its config.
        out: folder to create.
        teacher: export the teacher instead of the student.

    Raises:
        CheckpointError: the checkpoint is damaged or not in a run folder, its teacher is no model, or ``out`` exists.
    """
    config_file = checkpoint.absolute().parents[1] / CONFIG_FILE
    if not config_file.is_file():
        raise CheckpointError(
            f"{checkpoint}: is no checkpoint of a run; expected OUTPUT_DIR/checkpoints/step_K with OUTPUT_DIR/run.yaml"
        )
    fault = verify_checkpoint(checkpoint)
    if fault is not None:
        raise CheckpointError(f"{checkpoint}: is damaged ({fault}); choose another checkpoint")
    if out.exists():
        raise CheckpointError(f"{out}: exists already; name another folder")
    config = load_config(config_file)
    if teacher:
        _require_teacher(config.self_distillation)
    with torch.no_grad():
        load = _load_teacher if teacher else _load_student
        model = load(config.model, config.lora, checkpoint)
    saved = config.model if config.lora.rank else replace(config.model, path=str(checkpoint))
    reader = load_reader(saved, config.data.max_pixels)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_model(model, partial)
        (reader.processor if reader is not None else load_tokenizer(saved)).save_pretrained(partial)
        partial.rename(out)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _require_teacher(config: SelfDistillationConfig) -> None:
    reason = {
        "live": "is the student; export it without --teacher",
        "trust-region": "mixes the logits of two models, the reference model and the student, and is no single model",
    }.get(config.teacher_regularization)
    if not config.distills:
        reason = "does not exist with self_distillation.policy_loss_weight=1"
    if reason is not None:
        raise CheckpointError(f"--teacher: the teacher of this run {reason}")


def _load_student(config: ModelConfig, lora: LoraConfig, checkpoint: Path) -> PreTrainedModel:
    model = load_student(config, lora, checkpoint, CPU)
    if lora.rank:
        merge_adapters(model)
    return model


def _load_teacher(config: ModelConfig, lora: LoraConfig, checkpoint: Path) -> PreTrainedModel:
    if not lora.rank:
        return load_teacher_module(config, checkpoint, CPU)
    model = load_model(config, CPU)
    deltas = TrainingState.load(checkpoint).actor["teacher"]["weights"] or {}
    for name, delta in deltas.items():
        model.get_parameter(name).add_(delta)
    return model
