"""Settings of the data and of the reward function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sdpo.config.field import MISSING, Section, setting


@dataclass(frozen=True)
class DataConfig(Section):
    section: ClassVar[str] = "data"

    task: str = setting(
        MISSING,
        "Reward function: the name of a built-in task, or a Python file or module that defines "
        "`compute_score(row, response)`.",
        is_path=True,
        fixed=True,
    )
    task_args: dict[str, Any] = setting({}, "Arguments of the task, by name.", fixed=True)
    train_files: list[str] = setting([], "Parquet files of training rows, in verl's schema.", is_path=True, fixed=True)
    val_files: list[str] = setting([], "Parquet files of validation rows, in verl's schema.", is_path=True)
    solution_key: str = setting(
        "reward_model.ground_truth",
        "Field of a row that the teacher is shown as the solution: a path of names in reward_model or extra_info, such "
        "as extra_info.solution for a worked solution beside the graded answer.",
        fixed=True,
    )
    train_batch_size: int = setting(32, "Prompts per step.", ge=1, fixed=True)
    max_prompt_length: int = setting(2048, "Maximum length of a prompt, in tokens.", ge=1)
    filter_overlong_prompts: bool = setting(
        False, "Skip and count prompts longer than max_prompt_length; if false, they are an error."
    )
    max_pixels: int = setting(
        1_003_520,
        "Maximum size of an image, in pixels; larger images are scaled down. The default is 1280 patches of 28 x 28.",
        ge=1,
    )
    filter_unreadable_images: bool = setting(
        False, "Skip and count rows with images that cannot be read; if false, they are an error."
    )
    shuffle: bool = setting(
        True, "Draw the training rows in random order, another one each epoch, determined by the seed.", fixed=True
    )


@dataclass(frozen=True)
class RewardConfig(Section):
    section: ClassVar[str] = "reward"

    timeout_s: float | None = setting(
        30.0, "Seconds after which scoring one response counts as failed; null: no limit.", ge=0.01, le=86_400
    )
    max_failure_fraction: float = setting(
        0.1,
        "Abort when the reward function fails (exception, timeout, no score) on more than this fraction of a step's or "
        "a validation's responses.",
        ge=0,
        le=1,
    )
