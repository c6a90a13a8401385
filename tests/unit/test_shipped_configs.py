"""Every run file that ships is one that runs: it is read, in full, as the command line reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdpo.config import load_run

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(CONFIGS.rglob("*.yaml"))


def test_the_runs_that_make_names_are_shipped() -> None:
    assert {"hidden_rule.yaml", "hidden_rule_grpo.yaml"} <= {path.name for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_run_is_read(path: Path) -> None:
    run = load_run(path)
    assert run.run_dir == f"runs/{path.stem}", "one folder a run file, so that two runs never share one"
