"""Checkpoints in the Hugging Face format: the student in the folder itself, its teacher in ``teacher/``."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from sdpo.embedded.learner import Learner


def save_checkpoint(folder: Path, learner: Learner, processing: PreTrainedTokenizerBase | ProcessorMixin) -> Path:
    """Write ``folder/step_K``, which ``from_pretrained`` loads, with the tokenizer or processor.

    It is written beside and renamed, so that a folder of that name is always whole.
    """
    target = folder / f"step_{learner.version}"
    partial = folder / f".step_{learner.version}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    learner.student.save_pretrained(partial)
    processing.save_pretrained(partial)
    if learner.teacher is not None and learner.teacher.module is not None:
        learner.teacher.module.save_pretrained(partial / "teacher")  # type: ignore[operator]
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return target
