"""Parts and checks of ``prove.sh``, on files of mock runs; ``tests/verl/test_proof.py`` runs them on real ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdpo.errors import SDPOError
from sdpo.observability import metrics
from sdpo.verl_backend.smoke import checks
from sdpo.verl_backend.smoke.checks import STEPS, Finished
from sdpo.verl_backend.smoke.suite import choose_parts

ONE_GPU = ["text", "images", "lora"]


@pytest.mark.parametrize(
    ("names", "num_gpus", "chosen"),
    [
        ([], 0, ["one-step-off"]),
        ([], 1, ["images"]),
        ([], 2, ["one-step-off"]),
        (["all"], 0, [*ONE_GPU, "one-step-off"]),
        (["all"], 1, ONE_GPU),
        (["lora", "text", "lora"], 1, ["lora", "text"]),
    ],
)
def test_parts_depend_on_the_number_of_gpus(names: list[str], num_gpus: int, chosen: list[str]) -> None:
    assert choose_parts(names, num_gpus) == chosen


@pytest.mark.parametrize(
    ("name", "message"),
    [("one-step-off", "needs two GPUs"), ("video", "no such part; choose from all, text, images, lora, one-step-off")],
)
def test_impossible_part_is_refused(name: str, message: str) -> None:
    with pytest.raises(SDPOError, match=message):
        choose_parts([name], 1)


def make_run(folder: Path, rows: dict[int, dict[str, float]]) -> Finished:
    """A run with these metrics by step, which ended at step 2 and was resumed to step 3."""
    for end in (STEPS - 1, STEPS):
        steps = [step for step in rows if (step > STEPS - 1) == (end == STEPS)]
        lines = [json.dumps({"step": step, "data": rows[step]}) for step in steps]
        (folder / f"metrics.{end}.jsonl").write_text("\n".join(lines))
    return Finished(folder, folder / "hidden_rule", (STEPS - 1, STEPS), is_exact=True)


@pytest.mark.parametrize("losses", [{1: 0.5, 2: 0.4}, {1: 0.5, 2: 0.0, 3: 0.3}, {1: 0.5, 2: float("nan"), 3: 0.3}])
def test_missing_or_zero_losses_are_found(losses: dict[int, float], tmp_path: Path) -> None:
    for values, is_right in ((losses, False), ({1: 0.5, 2: 0.4, 3: 0.3}, True)):
        run = make_run(tmp_path, {step: {metrics.DISTILLATION_LOSS: loss} for step, loss in values.items()})
        if is_right:
            assert checks.check_losses(run) == "self-distillation loss 0.5000, 0.4000, 0.3000"
        else:
            with pytest.raises(AssertionError, match="self-distillation losses are"):
                checks.check_losses(run)


def test_missing_validation_is_found(tmp_path: Path) -> None:
    name = metrics.val_name("hidden_rule", "mean@1")
    run = make_run(tmp_path, {0: {name: 0.25}, 1: {}, 2: {}, 3: {name: 0.5}})
    assert checks.check_validation(run) == "validation accuracy 0.250 before, 0.500 after"
    for missing in (0, 3):
        rows = {step: {} if step == missing else {name: 0.25} for step in range(4)}
        with pytest.raises(AssertionError, match="validated at steps"):
            checks.check_validation(make_run(tmp_path, rows))


@pytest.mark.parametrize("off_policy", [False, True])
def test_sampler_is_compared_in_steps_with_equal_weights(off_policy: bool, tmp_path: Path) -> None:
    close, far = ({checks.SAMPLER_DIFFERENCE: d, checks.SAMPLER_CORRELATION: c} for d, c in ((1e-5, 1.0), (0.02, 0.9)))
    if off_policy:  # batches of steps 2 and 3 were sampled one update before
        ahead = tmp_path / f"checkpoints/global_step_{STEPS - 1}/prefetched.pt"
        ahead.parent.mkdir(parents=True)
        ahead.touch()
    checks.check_sampler(make_run(tmp_path, {1: close, 2: far if off_policy else close, 3: close}))
    for rows in ({1: far, 2: close, 3: close}, *([] if off_policy else [{1: close, 2: close, 3: far}])):
        with pytest.raises(AssertionError, match="mean difference and correlation"):
            checks.check_sampler(make_run(tmp_path, rows))


@pytest.mark.parametrize(("last", "num_steps"), [(STEPS - 1, STEPS - 1), (STEPS, 1)])
def test_wrong_step_of_a_checkpoint_is_found(
    last: int, num_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step count that restarts at a resume is that of the last start alone."""
    monkeypatch.setattr(checks, "load_teacher", lambda folder, step: {"weight": 0})
    run = make_run(tmp_path, {})
    for step, count, is_right in ((STEPS, STEPS, True), (last, num_steps, False)):
        folder = tmp_path / "checkpoints" / f"global_step_{step}" / "actor" / "teacher"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "teacher.json").write_text(json.dumps({"num_steps": count}))
        (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(step))
        if is_right:
            assert "a teacher of 3 steps, resumed at step 2" in checks.check_checkpoint(run)
        else:
            with pytest.raises(AssertionError, match=f"the last checkpoint is of step {step}, its teacher of"):
                checks.check_checkpoint(run)
