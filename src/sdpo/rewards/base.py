"""What a task is: rows in verl's parquet schema, and something that grades a response to one.

A task of your own is a Python file or module with ``compute_score(row, response)``, a function or a coroutine function;
it is named by ``data.task``. With arguments, define ``build_task(**task_args)`` that returns an object with that
method.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from sdpo.errors import DataError, SDPOError
from sdpo.observability.progress import ProgressCallback

BUILT_IN = {
    "figures": "sdpo.rewards.toy.figures",
    "geo3k": "sdpo.rewards.geo3k.reward",
    "hidden_rule": "sdpo.rewards.toy.hidden_rule",
}


@dataclass(frozen=True)
class Row:
    """One prompt with what is needed to grade its responses, as in verl's parquet files."""

    data_source: str
    prompt: list[dict[str, Any]]  # chat messages
    reward_model: Mapping[str, Any]  # {"style": "rule", "ground_truth": ...}
    ability: str = ""
    extra_info: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[bytes, ...] = ()  # image files, as the prompt's <image> tags name them
    origin: str = field(default="", compare=False)  # setting, file and number, for errors

    @property
    def ground_truth(self) -> str | None:
        value = self.reward_model.get("ground_truth")
        return None if value is None else str(value)


@dataclass(frozen=True)
class RewardOutput:
    """What a grader says of one response: a score, and in words what was wrong, if it can tell.

    A score of NaN stands for a grader that failed; no grader may return one.
    """

    score: float
    feedback: str | None = None


class Task(Protocol):
    """Grades responses; a built-in task may also make its own files (``prepare``)."""

    def compute_score(self, row: Row, response: str) -> Any:
        """A ``RewardOutput``, a number, or a mapping with ``score`` and on request ``feedback`` (as verl's scorers
        return).

        May be a coroutine function (``async def``), for graders that wait for others: many then wait side by side.
        """


def load_task(name: str, args: Mapping[str, Any]) -> Task:
    """Find a task by built-in name, Python file or module, and build it with its arguments.

    Raises:
        DataError: there is no such task, it cannot be imported, it has neither ``build_task`` nor ``grade``, or does
            not take the arguments.
    """
    module = _import_task(name)
    if hasattr(module, "build_task"):
        try:
            return module.build_task(**args)
        except SDPOError:
            raise
        except TypeError as error:
            raise DataError(f"data.task_args: {name}: {' '.join(str(error).split())}") from error
        except Exception as error:  # a task of one's own may raise anything
            raise DataError(f"data.task_args: {name}: {_explain(error, name)}") from error
    if not hasattr(module, "compute_score"):
        raise DataError(f"data.task: {name} defines neither compute_score(row, response) nor build_task(**task_args)")
    if args:
        raise DataError(f"data.task_args: {name} takes no arguments; define build_task(**task_args) in it")
    return module


def prepare_task(task: Task, observer: ProgressCallback) -> None:
    """Let a task that makes its own files make them."""
    prepare = getattr(task, "prepare", None)
    if prepare is not None:
        prepare(observer)


def _import_task(name: str) -> ModuleType:
    if name in BUILT_IN:
        return importlib.import_module(BUILT_IN[name])
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise DataError(f"data.task: {name}: no such file")
        spec = importlib.util.spec_from_file_location(f"sdpo_task_{Path(name).stem}", name)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up there
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # a file of one's own may raise anything
            del sys.modules[spec.name]
            raise DataError(f"data.task: {name}: cannot be imported ({_explain(error, name)})") from error
        return module
    unknown = DataError(f"data.task: no task {name!r}; built in: {', '.join(BUILT_IN)}; or a Python file or module")
    if not all(part.isidentifier() for part in name.split(".")):
        raise unknown
    try:
        return importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise unknown from error
        raise DataError(f"data.task: {name}: cannot be imported ({_explain(error)})") from error


def _explain(error: Exception, file: str = "") -> str:
    """Type and message in one line, with the last line of ``file`` that led to it."""
    place = find_place(error, file)  # a SyntaxError says its line itself
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}{place and f', {place}'}"


def find_place(error: BaseException, file: str | None) -> str:
    """``FILE:LINE`` at which a failed call was last in a file; empty if it never got there."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{file}:{lines[-1]}" if lines else ""


class InvalidRewardError(ValueError):
    """What a grader returned is no grade."""


def parse_reward(value: Any) -> RewardOutput:
    """The grade in what a grader returned.

    Raises:
        InvalidRewardError: the score is no finite number, or the feedback no text.
    """
    if isinstance(value, Mapping):
        value = RewardOutput(value.get("score"), value.get("feedback"))  # type: ignore[arg-type]
    if not isinstance(value, RewardOutput):
        value = RewardOutput(value)
    try:
        score = float(value.score)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise InvalidRewardError(f"the score must be a finite number, got {value.score!r:.80}")
    if value.feedback is not None and not isinstance(value.feedback, str):
        raise InvalidRewardError(f"the feedback must be text, got {value.feedback!r:.80}")
    return RewardOutput(score, value.feedback)
