"""A run that is stopped and resumed ends bit-for-bit like the uninterrupted run."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdpo.config.root import SDPOConfig
from sdpo.errors import SDPOError
from sdpo.observability import metrics
from sdpo.trainer import build
from sdpo.trainer.actor.actor import Actor
from sdpo.trainer.checkpoint.state import FILE
from sdpo.trainer.rollout.process import ProcessSampler
from sdpo.trainer.trainer import SDPOTrainer

MakeRun = Callable[..., SDPOConfig]
SETTINGS: dict[str, Any] = {
    "max_steps": 5,
    "save_steps": 2,
    "eval_steps": 2,
    "optim__lr": 3e-3,
    "optim__lr_scheduler_type": "cosine",
    "actor__mini_batch_size": 2,
    "self_distillation__ema_update_rate": 0.3,
    "self_distillation__distillation_coef_end": 0.5,
}


class Killed(BaseException):
    """An exception that the program does not catch; it replaces SIGKILL."""


def kill_in_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Raise after the first optimizer step of a training step, while the weights belong to no complete step."""
    update = Actor._update

    def killed(actor: Actor) -> Any:
        values = update(actor)
        if actor.version + 1 == step:
            raise Killed
        return values

    monkeypatch.setattr(Actor, "_update", killed)


def read_rows(config: SDPOConfig) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("timing_s/") and k != metrics.THROUGHPUT} for row in rows]


def assert_same_end(resumed: SDPOConfig, uninterrupted: SDPOConfig) -> None:
    """Compare student, teacher, optimizer state, rollouts in flight and metrics."""
    assert read_rows(resumed) == read_rows(uninterrupted)
    folders = [
        Path(config.output_dir) / "checkpoints" / f"step_{uninterrupted.max_steps}"
        for config in (resumed, uninterrupted)
    ]
    for name in ("model.safetensors", "teacher/model.safetensors"):
        one, two = (load_file(folder / name) for folder in folders)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name
    one, two = (torch.load(folder / FILE) for folder in folders)
    assert_equal(one["actor"], two["actor"])
    assert one["rollouts"] == two["rollouts"]


def assert_equal(one: Any, two: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_equal(one[key], two[key])
    elif isinstance(one, list):
        assert len(one) == len(two)
        for pair in zip(one, two, strict=True):
            assert_equal(*pair)
    elif hasattr(one, "codes"):  # an optimizer state in 8 bits
        assert torch.equal(one.codes, two.codes) and torch.equal(one.scale, two.scale)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    else:
        assert one == two


HALF = {"model__dtype": "bfloat16", "optim__betas": [0.9, 0.95]}
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": HALF,
    "8-bit": {"actor__autocast": True, "optim__name": "adamw_8bit"},
    "random": {**HALF, "optim__stochastic_rounding": True},
    "8-bit random": {**HALF, "optim__name": "adamw_8bit", "optim__stochastic_rounding": True},
}


@pytest.fixture(autouse=True)
def log_infos(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@pytest.mark.parametrize("max_staleness", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("precision", "killed_in"),
    [
        pytest.param(
            name, step, marks=[] if name == "float32" or (name, step) == ("8-bit random", 4) else [pytest.mark.slow]
        )
        for name in PRECISIONS
        for step in (2, 4)
    ],
)
def test_killed_run_resumes_to_the_same_result(
    make_task_run: MakeRun,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    max_staleness: int,
    killed_in: int,
    precision: str,
) -> None:
    if precision not in ("float32", "bfloat16"):
        pytest.importorskip("torchao")
    settings = {**SETTINGS, "max_staleness": max_staleness, "save_steps": 1, **PRECISIONS[precision]}
    uninterrupted = make_task_run(**settings, output_dir=str(tmp_path / "uninterrupted"))
    SDPOTrainer(uninterrupted).train()
    config = make_task_run(**settings, output_dir=str(tmp_path / "killed"))
    with monkeypatch.context() as patch:
        kill_in_step(patch, killed_in)
        with pytest.raises(Killed):
            SDPOTrainer(config).train()
    SDPOTrainer(replace(config, resume_mode="required")).train()
    assert any(text.startswith(f"resuming after step {killed_in - 1} from ") for text in caplog.messages)
    assert_same_end(config, uninterrupted)


def test_another_process_loads_8_bit_moments(make_task_run: MakeRun) -> None:
    """``torch.load`` needs torchao's types; importing transformers imports them."""
    pytest.importorskip("torchao")
    config = make_task_run(**SETTINGS, optim__name="adamw_8bit", max_staleness=0)
    SDPOTrainer(config).train()
    folder = Path(config.output_dir) / "checkpoints" / f"step_{config.max_steps}"
    code = (
        "import sys; from pathlib import Path; from sdpo.trainer.checkpoint.state import TrainingState;"
        "state = TrainingState.load(Path(sys.argv[1]));"
        "print(sum(hasattr(s['exp_avg'], 'codes') for s in state.actor['moments'].values()))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 0


# --- signals


def send_in_step(
    monkeypatch: pytest.MonkeyPatch, step: int, where: str, number: signal.Signals, times: int = 1
) -> None:
    """Send a signal in a training step: before, after the first, or after the second of its two updates."""
    update, accumulate, update_policy = Actor._update, Actor._accumulate_gradients, Actor.update_policy
    sent: list[int] = []

    def send(actor: Actor, steps_done: int) -> None:
        if actor.version + 1 - steps_done == step and len(sent) < times:
            for _ in range(times):
                sent.append(number)
                os.kill(os.getpid(), number)

    def before(actor: Actor, *arguments: Any) -> Any:
        send(actor, 0)
        return accumulate(actor, *arguments)

    def between(actor: Actor) -> Any:
        values = update(actor)
        send(actor, 0)
        return values

    def after(actor: Actor, *args: Any, **kwargs: Any) -> Any:
        values = update_policy(actor, *args, **kwargs)
        send(actor, 1)
        return values

    replaced = {
        "before": ("_accumulate_gradients", before),
        "between": ("_update", between),
        "after": ("update_policy", after),
    }
    monkeypatch.setattr(Actor, *replaced[where])


@pytest.mark.parametrize("max_staleness", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("where", "saved"), [("before", 2), ("between", 3), ("after", 3)])
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_stopped_run_saves_its_last_complete_step_and_resumes_to_the_same_result(
    make_task_run: MakeRun,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    max_staleness: int,
    where: str,
    saved: int,
    number: signal.Signals,
) -> None:
    settings = {**SETTINGS, "max_staleness": max_staleness, "save_steps": 0, "eval_steps": 3}
    SDPOTrainer(uninterrupted := make_task_run(**settings, output_dir=str(tmp_path / "uninterrupted"))).train()
    config = make_task_run(**settings, output_dir=str(tmp_path / "stopped"))
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        send_in_step(patch, 3, where, number)
        assert SDPOTrainer(config).train().interrupt_signal == number.name
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [p.name for p in (Path(config.output_dir) / "checkpoints").iterdir()] == [f"step_{saved}"]
    assert SDPOTrainer(replace(config, resume_mode="auto")).train().interrupt_signal is None
    assert_same_end(config, uninterrupted)


def test_second_signal_between_two_updates_stops_without_saving(
    make_task_run: MakeRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    SDPOTrainer(uninterrupted := make_task_run(**SETTINGS, output_dir=str(tmp_path / "uninterrupted"))).train()
    config = make_task_run(**SETTINGS)
    with monkeypatch.context() as patch:
        send_in_step(patch, 4, "between", signal.SIGINT, times=2)
        assert SDPOTrainer(config).train().interrupt_signal == "SIGINT"
    assert caplog.messages[-1] == "stopped during an update; the latest checkpoint is of step 2"
    SDPOTrainer(replace(config, resume_mode="auto")).train()
    assert_same_end(config, uninterrupted)


@pytest.mark.slow
def test_rollouts_beyond_the_shutdown_timeout_are_discarded_with_a_warning(
    make_task_run: MakeRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_task_run(**SETTINGS, max_staleness=1, shutdown_timeout=0.0)
    collect = ProcessSampler.collect
    monkeypatch.setattr(
        ProcessSampler, "collect", lambda self, timeout=None: None if timeout == 0 else collect(self, timeout)
    )
    with monkeypatch.context() as patch:
        send_in_step(patch, 3, "after", signal.SIGTERM)
        SDPOTrainer(config).train()
    assert caplog.messages[-1] == "in-flight rollouts were discarded; the resumed run will not be bit-for-bit identical"
    SDPOTrainer(replace(config, resume_mode="required")).train()
    assert [row[metrics.STALENESS] for row in read_rows(config) if metrics.STALENESS in row] == [0, 1, 1, 0, 1]


def test_error_saves_the_last_complete_step(make_task_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_task_run(**{**SETTINGS, "save_steps": 0})

    def fail(actor: Actor, *arguments: Any) -> Any:
        if actor.version == 2:
            raise ZeroDivisionError
        return accumulate(actor, *arguments)

    accumulate = Actor._accumulate_gradients
    with monkeypatch.context() as patch:
        patch.setattr(Actor, "_accumulate_gradients", fail)
        with pytest.raises(ZeroDivisionError):
            SDPOTrainer(config).train()
    assert [p.name for p in (Path(config.output_dir) / "checkpoints").iterdir()] == ["step_2"]


# --- checkpoints and settings


@pytest.fixture
def stopped(make_task_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> SDPOConfig:
    """A run killed in step 5, with checkpoints after steps 2 and 4."""
    config = make_task_run(**SETTINGS)
    with monkeypatch.context() as patch:
        kill_in_step(patch, 5)
        with pytest.raises(Killed):
            SDPOTrainer(config).train()
    return config


def test_run_resumes_from_the_checkpoint_before_a_damaged_one(
    stopped: SDPOConfig, make_task_run: MakeRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    SDPOTrainer(uninterrupted := make_task_run(**SETTINGS, output_dir=str(tmp_path / "uninterrupted"))).train()
    damaged = Path(stopped.output_dir) / "checkpoints" / "step_4"
    (damaged / FILE).write_bytes((damaged / FILE).read_bytes()[:-1])
    caplog.clear()
    SDPOTrainer(replace(stopped, resume_mode="auto")).train()
    assert caplog.messages[0].startswith(f"{damaged} is damaged ({FILE} has ")
    assert caplog.messages[1] == f"resuming after step 2 from {damaged.with_name('step_2')}"
    assert_same_end(stopped, uninterrupted)


def test_auto_starts_and_required_refuses_without_a_complete_checkpoint(
    stopped: SDPOConfig, make_task_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    for path in (Path(stopped.output_dir) / "checkpoints").glob("step_*/manifest.json"):
        path.unlink()
    with pytest.raises(SDPOError, match="has no complete checkpoint to resume from; start without --resume"):
        SDPOTrainer(replace(stopped, resume_mode="required")).train()
    SDPOTrainer(replace(stopped, resume_mode="auto")).train()
    assert caplog.messages[-1] == f"output_dir={stopped.output_dir}: moved the earlier run to {stopped.output_dir}.1"
    fresh = make_task_run(output_dir=f"{stopped.output_dir}/../fresh", resume_mode="required")
    with pytest.raises(SDPOError, match="has no complete checkpoint"):
        SDPOTrainer(fresh).train()
    assert not Path(fresh.output_dir).exists()


def change(config: SDPOConfig, key: str, value: Any) -> SDPOConfig:
    section, _, name = key.rpartition(".")
    if not section:
        return replace(config, **{name: value})
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1),
        ("max_steps", 6),  # this run's learning rate schedule depends on it
        ("max_staleness", 1),
        ("data.train_batch_size", 8),
        ("rollout.n", 3),
        ("self_distillation.teacher_regularization", "frozen"),
    ],
)
def test_change_of_a_fixed_setting_is_refused(stopped: SDPOConfig, key: str, value: Any) -> None:
    with pytest.raises(SDPOError, match=rf"^{key}={value!r}: was .* when the run started and must not"):
        SDPOTrainer(replace(change(stopped, key, value), resume_mode="required")).train()


def test_change_of_another_setting_is_logged_and_takes_effect(
    stopped: SDPOConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = change(
        change(replace(stopped, resume_mode="required"), "optim.lr", 1e-4), "tracking.log_completions_steps", 1
    )
    caplog.clear()
    result = SDPOTrainer(config).train()
    assert caplog.messages[:2] == [
        "optim.lr=0.0001 from now on; was 0.003",
        "tracking.log_completions_steps=1 from now on; was 10",
    ]
    # the last of ten optimizer steps of a cosine schedule
    assert result.metrics[metrics.LR] == pytest.approx(1e-4 * (1 + math.cos(math.pi * 0.9)) / 2)
    assert (Path(config.output_dir) / "rollouts" / "step_5.txt").exists()


def test_change_of_what_the_run_is_made_of_is_refused(stopped: SDPOConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = build.compute_fingerprints
    changed = {"the rows of data.train_files": "others"}
    monkeypatch.setattr(build, "compute_fingerprints", lambda *arguments: compute(*arguments) | changed)
    message = r"^output_dir: .*step_\d was trained with another state of the rows of data\.train_files; restore it"
    with pytest.raises(SDPOError, match=message):
        SDPOTrainer(replace(stopped, resume_mode="required")).train()


def test_complete_run_can_be_repeated_and_extended(make_task_run: MakeRun, tmp_path: Path) -> None:
    SDPOTrainer(
        uninterrupted := make_task_run(max_steps=4, save_steps=2, output_dir=str(tmp_path / "uninterrupted"))
    ).train()
    SDPOTrainer(config := make_task_run(max_steps=2, save_steps=2, output_dir=str(tmp_path / "short"))).train()
    rows = read_rows(config)
    with pytest.raises(
        SDPOError, match=r"^max_steps=1: the run in output_dir=.* has trained 2 steps already; raise it$"
    ):
        SDPOTrainer(replace(config, resume_mode="auto", max_steps=1)).train()
    # a run killed after its last checkpoint writes the missing last row
    metrics_file = Path(config.output_dir) / "metrics.jsonl"
    metrics_file.write_text("".join(metrics_file.read_text().splitlines(keepends=True)[:-1]))
    result = SDPOTrainer(replace(config, resume_mode="auto")).train()
    assert read_rows(config) == rows and result.metrics[metrics.STEP] == 2
    longer = replace(config, max_steps=4, resume_mode="auto")
    SDPOTrainer(longer).train()
    # only the shorter run is evaluated after step 2
    rows = [{k: v for k, v in row.items() if not k.startswith("val-")} for row in read_rows(longer)]
    assert rows == [{k: v for k, v in row.items() if not k.startswith("val-")} for row in read_rows(uninterrupted)]


def test_second_run_in_one_folder_is_refused(make_task_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_task_run(**SETTINGS)
    refused: list[str] = []
    update_policy = Actor.update_policy

    def start_another(actor: Actor, *args: Any, **kwargs: Any) -> Any:
        for resume_mode in ("disable", "auto", "required"):
            with pytest.raises(SDPOError) as caught:
                SDPOTrainer(replace(config, resume_mode=resume_mode)).train()
            refused.append(str(caught.value))
        monkeypatch.undo()
        return update_policy(actor, *args, **kwargs)

    monkeypatch.setattr(Actor, "update_policy", start_another)
    SDPOTrainer(config).train()
    assert len(refused) == 3
    assert all(
        text.startswith(f"output_dir={config.output_dir}: another run is writing to it (process {os.getpid()} on ")
        for text in refused
    )
    assert [row[metrics.STEP] for row in read_rows(config)] == [0, 1, 2, 3, 4, 5]


def test_run_resumes_with_health_events_and_actions(
    make_task_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A health check freezes a live teacher; the run is killed before and after that."""
    settings: dict[str, Any] = {
        "max_steps": 5,
        "save_steps": 1,
        "eval_steps": 1,
        "optim__lr": 3e-3,
        "self_distillation__teacher_regularization": "live",
        "health__window": 1,
        "health__min_z_score": 0.0,
        "health__entropy_explosion": "freeze_teacher",
        "health__entropy_rise": 1.0,
        "health__length_collapse": "reduce_weight",
        "health__length_fall": 1.0,
        "health__ref_kl_interval": 1,
    }
    uninterrupted = make_task_run(**settings, output_dir=str(tmp_path / "uninterrupted"))
    SDPOTrainer(uninterrupted).train()
    events = (Path(uninterrupted.output_dir) / "health_events.jsonl").read_text()
    frozen_at = min(json.loads(line)["step"] for line in events.splitlines() if '"freeze_teacher"' in line)
    assert 1 < frozen_at < 5
    for killed_in in {frozen_at, frozen_at + 1}:
        config = make_task_run(**settings, output_dir=str(tmp_path / f"killed_in_{killed_in}"))
        with monkeypatch.context() as patch:
            kill_in_step(patch, killed_in)
            with pytest.raises(Killed):
                SDPOTrainer(config).train()
        SDPOTrainer(replace(config, resume_mode="required")).train()
        assert (Path(config.output_dir) / "health_events.jsonl").read_text() == events
        assert_same_end(config, uninterrupted)
