"""From a checkpoint to a plain model folder, of the student or of its teacher."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sdpo.config.loader import load_config
from sdpo.config.root import SDPOConfig
from sdpo.errors import CheckpointError
from sdpo.models.loading import load_model, load_tokenizer
from sdpo.models.lora.adapters import merge_adapters
from sdpo.models.multimodal.processor import load_reader
from sdpo.trainer.checkpoint.manager import verify_checkpoint
from sdpo.trainer.checkpoint.state import TrainingState, load_student, load_teacher_module

CPU = torch.device("cpu")


def export_model(checkpoint: Path, out: Path, *, teacher: bool = False) -> None:
    """Write a model that ``from_pretrained`` loads, adapters merged into it, with its tokenizer or processor.

    Args:
        checkpoint: ``step_K`` in a run folder, whose ``run.yaml`` says what it is of.
        out: a folder that does not exist yet.
        teacher: the teacher as it was after that step, and not the student.

    Raises:
        CheckpointError: the checkpoint is damaged or not in a run folder, there is no such teacher, or ``out`` exists.
    """
    run_file = checkpoint.absolute().parents[1] / "run.yaml"
    if not run_file.is_file():
        raise CheckpointError(
            f"{checkpoint}: no checkpoint in a run folder (RUN_DIR/checkpoints/step_K with RUN_DIR/run.yaml)"
        )
    fault = verify_checkpoint(checkpoint)
    if fault is not None:
        raise CheckpointError(f"{checkpoint}: is damaged ({fault}); take another one")
    if out.exists():
        raise CheckpointError(f"{out}: exists already; name another folder")
    run = load_config(run_file)
    if teacher:
        _require_teacher(run)
    with torch.no_grad():
        model = _load_teacher(run, checkpoint) if teacher else _load_student(run, checkpoint)
    saved = run.model if run.lora.rank else replace(run.model, path=str(checkpoint))
    reader = load_reader(saved, run.data.max_pixels)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        (reader.processor if reader is not None else load_tokenizer(saved)).save_pretrained(partial)
        partial.rename(out)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _require_teacher(run: SDPOConfig) -> None:
    config = run.self_distillation
    reason = {
        "live": "is the student itself; export that",
        "trust-region": "is a mixture of two models' logits, the initial one's and the student's; no one model is it",
    }.get(config.teacher_regularization)
    if not config.distills:
        reason = "does not exist with policy_loss_weight=1"
    if reason is not None:
        raise CheckpointError(f"--teacher: the teacher of this run (self_distillation.teacher_regularization) {reason}")


def _load_student(run: SDPOConfig, checkpoint: Path) -> PreTrainedModel:
    model = load_student(run, checkpoint, CPU)
    if run.lora.rank:
        merge_adapters(model)
    return model


def _load_teacher(run: SDPOConfig, checkpoint: Path) -> PreTrainedModel:
    if not run.lora.rank:
        return load_teacher_module(run, checkpoint, CPU)
    model = load_model(run.model, CPU)
    deltas = TrainingState.load(checkpoint).actor["teacher"]["weights"] or {}
    for name, delta in deltas.items():
        model.get_parameter(name).add_(delta)
    return model
