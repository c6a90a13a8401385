"""A fault of the pipeline fails exactly the checks of ``prove.sh`` that cover it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdpo.verl_backend.smoke.checks import Finished
from sdpo.verl_backend.smoke.suite import checks

ROOT = Path(__file__).parents[2]
RATE = "actor_rollout_ref.actor.self_distillation.ema_update_rate=0.0505"  # the checks expect 0.05

Start = Callable[..., Any]


@pytest.fixture
def prove(start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Start:
    """Return a function that starts ``prove.sh`` in ``tmp_path / "proof"``."""
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("SMOKE_DIR", str(tmp_path / "proof"))
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{ROOT / 'src'}")
    return lambda *arguments: start("bash", str(ROOT / "recipe" / "SDPO" / "prove.sh"), *arguments)


@pytest.mark.parametrize(
    ("part", "fault", "overrides", "failing"),
    [
        ("text", "stale", [RATE], {"check_sampler", "check_teacher"}),
        ("images", "images", [], {"check_sampler"}),
    ],
)
def test_fault_fails_exactly_the_matching_checks(
    part: str, fault: str, overrides: list[str], failing: set[str],
    prove: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("FAULT", fault)
    running = prove(part, "actor_rollout_ref.model.external_lib=faults", *overrides)
    assert running.wait() == 1, running.tail()
    text = running.tail()
    found = {line.partition("WRONG ")[2].partition(":")[0] for line in text.splitlines() if "  WRONG " in line}
    assert found == {name.replace("_", " ") for name in failing}, text
    if "check_teacher" in failing:
        assert "it moves by 0.05050 of the distance instead of 0.05" in text
    # The GPU's thresholds, which allow for bfloat16, detect the fault too.
    run = Finished(tmp_path / "proof" / part, tmp_path / "proof" / "tasks", (2, 3) if part == "text" else (3,), False)
    with pytest.raises(AssertionError, match="mean difference and correlation"):
        checks.check_sampler(run)
