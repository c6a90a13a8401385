"""What a task is: rows in verl's parquet schema, and something that grades a response to one.

A task of your own is a Python file or module with ``compute_score(row, response)``, a function or a coroutine function;
it is named by ``data.task``. With arguments, define ``build_task(**task_args)`` that returns an object with that
method.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
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
REQUIRED_COLUMNS = ("data_source", "prompt", "reward_model")


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


def load_rows(files: Sequence[str], setting: str) -> list[Row]:
    """Read parquet files in verl's schema.

    Raises:
        DataError: no file given, a file that is missing, unreadable or empty, a column that is missing, or a row whose
            prompt is not a list of messages or whose images are no files; names the file, and the row or the column.
    """
    import pyarrow.parquet as pq

    if not files:
        raise DataError(f"{setting} is empty; name at least one parquet file")
    rows: list[Row] = []
    for name in files:
        if not os.path.isfile(name):
            raise DataError(f"{setting}: {name}: no such file")
        try:
            table = pq.read_table(name)
            records = table.to_pylist()
        except Exception as error:  # readers raise whatever a broken file makes them raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{setting}: {name}: not a readable parquet file ({reason})") from error
        missing = [column for column in REQUIRED_COLUMNS if column not in table.column_names]
        if missing:
            raise DataError(
                f"{setting}: {name}: column {missing[0]!r} is missing; it has {', '.join(table.column_names) or 'none'}"
            )
        rows.extend(_parse_row(record, f"{setting}: {name}: row {i}") for i, record in enumerate(records))
    if not rows:
        raise DataError(f"{setting}: {', '.join(files)}: no rows")
    return rows


def _parse_row(record: Mapping[str, Any], where: str) -> Row:
    prompt = record["prompt"]
    if not isinstance(prompt, list) or not prompt:
        raise DataError(f"{where}: prompt must be a list of messages with role and content, got {prompt!r:.80}")
    for message in prompt:
        _check_message(message, where)
    if not any(message["role"] == "user" for message in prompt):
        raise DataError(f"{where}: the prompt has no user message")
    if not isinstance(record["reward_model"], Mapping):
        raise DataError(f"{where}: reward_model must have ground_truth in it, got {record['reward_model']!r:.80}")
    if record["data_source"] is None:
        raise DataError(f"{where}: data_source must be a name, got None")
    for column, kind in (("extra_info", Mapping), ("images", list)):
        if not isinstance(record.get(column), (kind, type(None))):
            name = "a mapping" if kind is Mapping else "a list"
            raise DataError(f"{where}: {column} must be {name} or null, got {record[column]!r:.80}")
    return Row(
        data_source=str(record["data_source"]),
        prompt=prompt,
        reward_model=record["reward_model"],
        ability=str(record.get("ability") or ""),
        extra_info=record.get("extra_info") or {},
        images=tuple(read_image(image, where) for image in record.get("images") or ()),
        origin=where,
    )


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict) or not message.get("role") or message.get("content") is None:
        raise DataError(f"{where}: a message of the prompt needs role and content, got {message!r:.80}")
    role, content = message["role"], message["content"]
    if not isinstance(role, str):
        raise DataError(f"{where}: a message's role must be text, got {role!r:.80}")
    if isinstance(content, str):
        return
    if not isinstance(content, list) or not content:
        raise DataError(f"{where}: a message's content must be text or a list of parts, got {content!r:.80}")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "image" and not (kind == "text" and isinstance(part.get("text"), str)):
            raise DataError(
                f"{where}: a part of a message must be of type image, or of type text with a text, got {part!r:.80}"
            )


def read_image(image: Any, where: str) -> bytes:
    """The file's content; the column holds it, or {"bytes": ..., "path": ...} as ``datasets`` does, or a path.

    Raises:
        DataError: it is none of these, or there is no such file; begins with ``where``.
    """
    data, path = (image.get("bytes"), image.get("path")) if isinstance(image, Mapping) else (image, image)
    if isinstance(data, bytes):
        return data
    if not isinstance(path, str):
        raise DataError(f"{where}: an image must be bytes, a path, or a mapping with one of them, got {image!r:.80}")
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise DataError(f"{where}: image {path}: cannot be read ({error.strerror})") from error


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
        raise InvalidRewardError(f"the grader's score must be a finite number, got {value.score!r:.80}")
    if value.feedback is not None and not isinstance(value.feedback, str):
        raise InvalidRewardError(f"the grader's feedback must be text, got {value.feedback!r:.80}")
    return RewardOutput(score, value.feedback)
