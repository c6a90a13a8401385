"""Read rows from parquet files in verl's schema."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdpo.errors import DataError
from sdpo.rewards.base import Row

REQUIRED_COLUMNS = ("data_source", "prompt", "reward_model")


def load_rows(files: Sequence[str], setting: str) -> list[Row]:
    """Read parquet files in verl's schema.

    Raises:
        DataError: no files; a missing, unreadable or empty file; a missing column; a prompt that is not a list of
            messages; or an image that is not a file. Names the file, and the row or the column.
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
        except Exception as error:  # a broken file may cause any error
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


def drop_nulls(value: Any) -> Any:
    """Remove keys without a value from nested mappings.

    A parquet column has one type, so every mapping in it has the keys of all rows, most of them null. Templates read
    such keys: with ``"image": null`` beside a text, Qwen-VL's shows an image. A message's ``content`` may be null.
    """
    if isinstance(value, Mapping):
        return {
            key: drop_nulls(inner)
            for key, inner in value.items()
            if inner is not None or (key == "content" and "role" in value)
        }
    return [drop_nulls(each) for each in value] if isinstance(value, list) else value


def read_solution(row: Mapping[str, Any], key: str, where: str) -> str | None:
    """Read the text that the teacher is shown as the solution; None if the row has none.

    Args:
        row: ``reward_model`` and ``extra_info`` of a row.
        key: ``data.solution_key``.
        where: the row, for the message.

    Raises:
        DataError: it is a list or a mapping.
    """
    value: Any = row
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        return str(value)
    kind = "a mapping" if isinstance(value, Mapping) else "a list"
    raise DataError(
        f"{where}: {key} is {kind} ({value!r:.80}), which cannot be shown to the teacher; set data.solution_key to a "
        "field with text, such as extra_info.solution, or self_distillation.demonstration_source=successful_rollout"
    )


def _parse_row(record: Mapping[str, Any], where: str) -> Row:
    record = {column: drop_nulls(value) if column != "images" else value for column, value in record.items()}
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
    if not isinstance(message, dict) or not message.get("role"):
        raise DataError(f"{where}: a message of the prompt needs role and content, got {message!r:.80}")
    if message["role"] == "assistant" and message.get("tool_calls") and message.get("content") is None:
        message["content"] = None  # as in OpenAI's format
        return
    if message.get("content") is None:
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
    """Read an image cell: bytes, a path, or {"bytes": ..., "path": ...} as ``datasets`` writes it.

    Raises:
        DataError: the cell is none of these, or the file cannot be read; begins with ``where``.
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
