"""Definition of a task: a reward function for rows in verl's parquet schema.

A custom task is a Python file or module that defines ``compute_score(row, response)``, as a function or a coroutine
function; ``data.task`` names it. A task with arguments defines ``build_task(**task_args)`` instead, which returns an
object with the method ``compute_score``.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
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


MAX_SCORE = 1e30  # squares of differences stay far below the largest float64
KNOWN_KEYS = ("score", "feedback")  # of a reward function's answer


@dataclass(frozen=True)
class Row:
    """A prompt and the data that scoring its responses needs, as in verl's parquet files."""

    data_source: str
    prompt: list[dict[str, Any]]  # chat messages
    reward_model: Mapping[str, Any]  # {"style": "rule", "ground_truth": ...}
    ability: str = ""
    extra_info: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[bytes, ...] = ()  # contents of image files, in the order of the prompt's <image> tags
    origin: str = field(default="", compare=False)  # setting, file and number of the row, for error messages

    @property
    def ground_truth(self) -> str | None:
        """The answer as text; a task whose answers are lists or mappings reads ``reward_model`` instead."""
        value = self.reward_model.get("ground_truth")
        return None if value is None else str(value)


@dataclass(frozen=True)
class RewardOutput:
    """Score of a response, with optional feedback in words.

    A score of NaN means that the reward function failed; a reward function must not return NaN.

    Attributes:
        unknown_keys: names in the reward function's answer that have no meaning.
    """

    score: float
    feedback: str | None = None
    unknown_keys: tuple[str, ...] = field(default=(), compare=False)


class Task(Protocol):
    """A reward function; a built-in task may also create its data and model (``prepare``)."""

    def compute_score(self, row: Row, response: str) -> Any:
        """Return a ``RewardOutput``, a number, or a mapping with ``score`` and optionally ``feedback`` (as in verl).

        May be a coroutine function (``async def``); calls then run concurrently, for example to query a service.
        """


def load_task(name: str, args: Mapping[str, Any]) -> Task:
    """Find a task by built-in name, Python file or module, and build it with its arguments.

    Raises:
        DataError: the task does not exist, cannot be imported, defines neither ``build_task`` nor ``compute_score``,
            or refuses the arguments.
    """
    module = _import_task(name)
    if hasattr(module, "build_task"):
        try:
            return module.build_task(**args)
        except SDPOError:
            raise
        except TypeError as error:
            accepted = ", ".join(inspect.signature(module.build_task).parameters) or "no arguments"
            reason = " ".join(str(error).split())
            raise DataError(f"data.task_args: {name}: {reason}; it accepts {accepted}") from error
        except Exception as error:  # a custom task may raise anything
            raise DataError(f"data.task_args: {name}: {_explain(error, name)}") from error
    if not hasattr(module, "compute_score"):
        raise DataError(
            f"data.task={name}: defines neither compute_score(row, response) nor build_task(**task_args); add one"
        )
    if args:
        raise DataError(
            f"data.task_args: {name} takes no arguments; remove them (data.task_args={{}}), or define "
            "build_task(**task_args)"
        )
    return module


def prepare_task(task: Task, progress: ProgressCallback) -> None:
    """Let a task create its own files, if it has any."""
    prepare = getattr(task, "prepare", None)
    if prepare is not None:
        prepare(progress)


def _import_task(name: str) -> ModuleType:
    if name in BUILT_IN:
        return importlib.import_module(BUILT_IN[name])
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise DataError(f"data.task={name}: no such file")
        spec = importlib.util.spec_from_file_location(f"sdpo_task_{Path(name).stem}", name)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look up their module there
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # a custom file may raise anything
            del sys.modules[spec.name]
            raise DataError(f"data.task={name}: cannot be imported ({_explain(error, name)})") from error
        return module
    unknown = DataError(f"data.task={name}: no such task; use {', '.join(BUILT_IN)}, a file or a module")
    if not all(part.isidentifier() for part in name.split(".")):
        raise unknown
    try:
        return importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise unknown from error
        raise DataError(f"data.task={name}: cannot be imported ({_explain(error)})") from error


def _explain(error: Exception, file: str = "") -> str:
    """Type and message of an error in one line, with the last line of ``file`` in its traceback."""
    place = find_place(error, file)  # empty for a SyntaxError, which names its line in the message
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}{place and f', {place}'}"


def find_place(error: BaseException, file: str | None) -> str:
    """Return ``FILE:LINE`` of the last frame of a traceback in ``file``; empty without such a frame."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{file}:{lines[-1]}" if lines else ""


class InvalidRewardError(ValueError):
    """The return value of a reward function is not a score."""


def parse_reward(value: Any) -> RewardOutput:
    """Convert the return value of a reward function.

    Raises:
        InvalidRewardError: the score is not a number up to ``MAX_SCORE``, or the feedback is not text that can be
            written as UTF-8.
    """
    unknown_keys: tuple[str, ...] = ()
    if isinstance(value, Mapping):
        unknown_keys = tuple(str(key) for key in value if key not in KNOWN_KEYS)
        value = RewardOutput(value.get("score"), value.get("feedback"))  # type: ignore[arg-type]
    if not isinstance(value, RewardOutput):
        value = RewardOutput(value)
    try:
        score = float(value.score)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise InvalidRewardError(f"the score must be a finite number, got {value.score!r:.80}")
    if abs(score) > MAX_SCORE:
        raise InvalidRewardError(f"the score must be between -{MAX_SCORE:g} and {MAX_SCORE:g}, got {score:g}")
    if value.feedback is not None and not isinstance(value.feedback, str):
        raise InvalidRewardError(f"the feedback must be text, got {value.feedback!r:.80}")
    if value.feedback is not None and any("\ud800" <= character <= "\udfff" for character in value.feedback):
        raise InvalidRewardError(f"the feedback has half a surrogate pair, got {value.feedback!a:.80}")
    return RewardOutput(score, value.feedback, unknown_keys)


def describe_unknown_key(key: str) -> str:
    """Message about a name in the answer of a reward function that has no meaning."""
    near = difflib.get_close_matches(key, KNOWN_KEYS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"only {' and '.join(KNOWN_KEYS)} are read"
    return f"data.task: the reward function returns {key!r}, which is ignored; {hint}"
