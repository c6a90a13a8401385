import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdpo.observability.metrics import STEP

WriteRun = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Writes a run folder by hand: rows by step, settings as they stand in run.yaml."""

    def write(
        name: str, rows: Sequence[Mapping[str, float]] | Mapping[int, Mapping[str, float]], **settings: Any
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        lines = [{STEP: step, **row} for step, row in rows.items()] if isinstance(rows, Mapping) else rows
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if settings:
            (folder / "run.yaml").write_text(yaml.safe_dump(settings))
        return folder

    return write
