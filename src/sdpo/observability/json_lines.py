"""Files with one JSON object per line, to which a run appends."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read all objects; incomplete lines, as a killed run may leave, are skipped, and a missing file is empty."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def write_json_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the file atomically."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def append_json_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append an object as one line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
