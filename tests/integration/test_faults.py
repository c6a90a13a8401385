"""Faults of the environment of a run; docs/native_trainer.md lists them in a table.

benchmarks/crash.py kills the actor; one test here runs a part of it. tests/unit/trainer/test_resume.py covers signals,
two runs in one folder and changed settings, tests/unit/rewards/test_scoring.py reward functions.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdpo import SDPOConfig, SDPOError, SDPOTrainer, load_config
from sdpo.observability import metrics
from sdpo.trainer.actor.actor import Actor
from sdpo.trainer.checkpoint.manager import find_newest
from sdpo.trainer.checkpoint.state import FILE
from sdpo.trainer.rollout.process import ProcessSampler

ROOT = Path(__file__).parents[2]
STARTS_PROCESSES = pytest.mark.slow


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults") / "task"


@pytest.fixture
def make_run(task_dir: Path, tmp_path: Path) -> Callable[..., SDPOConfig]:
    def make(*overrides: str, folder: Path = tmp_path) -> SDPOConfig:
        return load_config(
            ROOT / "configs" / "hidden_rule.yaml",
            [
                f"output_dir={folder}/run",
                f"data.task_args.dir={task_dir}",
                "data.task_args.pretrain_steps=0",
                "data.task_args.num_train=40",
                "data.task_args.num_test=8",
                "data.train_batch_size=4",
                "rollout.n=2",
                "max_steps=4",
                "save_steps=1",
                "eval_steps=0",
                "tracking.log_completions_steps=0",
                *overrides,
            ],
        )

    return make


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount a small file system, for which the test needs root."""
    mounted: list[Path] = []

    def make(*options: str) -> Path:
        folder = tmp_path / f"mounted{len(mounted)}"
        folder.mkdir()
        if not shutil.which("mount") or os.geteuid() != 0:
            pytest.skip("only root can mount a file system")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.decode()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def measure_checkpoint(run: SDPOConfig) -> int:
    SDPOTrainer(replace(run, max_steps=1, output_dir=f"{run.output_dir}_measured")).train()
    return sum(
        path.stat().st_size for path in Path(f"{run.output_dir}_measured/checkpoints").rglob("*") if path.is_file()
    )


def read_rows(run: SDPOConfig) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (Path(run.output_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("timing_s/") and k != metrics.THROUGHPUT} for row in rows]


def load_weights(run: SDPOConfig, step: int = 4) -> dict[str, torch.Tensor]:
    return load_file(Path(run.output_dir) / "checkpoints" / f"step_{step}" / "model.safetensors")


def assert_same_run(one: SDPOConfig, two: SDPOConfig) -> None:
    assert read_rows(one) == read_rows(two)
    weights, others = load_weights(one), load_weights(two)
    assert all(torch.equal(weights[name], others[name]) for name in others)


def test_run_stops_on_a_full_disk_and_resumes_with_more_space(
    make_run: Callable[..., SDPOConfig], mount: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    size = measure_checkpoint(make_run())
    disk = mount(f"size={int(2.5 * size) // 1024}k")  # space for two checkpoints, not for three
    run, uninterrupted = make_run("save_total_limit=4", folder=disk), make_run("save_total_limit=4")
    with pytest.raises(
        SDPOError, match=r"step_3: cannot be saved \(.*[nN]o space left.*\); earlier checkpoints are int"
    ):
        SDPOTrainer(run).train()
    folder = disk / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step_1", "step_2"]
    caplog.clear()
    assert find_newest(folder) == folder / "step_2"
    assert caplog.messages == []

    subprocess.run(["mount", "-o", f"remount,size={8 * size // 1024}k", disk], check=True)
    SDPOTrainer(replace(run, resume_mode="required")).train()
    SDPOTrainer(uninterrupted).train()
    assert_same_run(run, uninterrupted)


def test_disk_too_full_for_a_row_of_metrics(
    make_run: Callable[..., SDPOConfig], mount: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = mount("size=64k")
    update_policy = Actor.update_policy

    def fill_disk(actor: Actor, *args: Any, **kwargs: Any) -> Any:
        if actor.version == 1:
            with pytest.raises(OSError), (disk / "filling").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1024))
        return update_policy(actor, *args, **kwargs)

    monkeypatch.setattr(Actor, "update_policy", fill_disk)
    run = make_run("save_steps=0", "max_steps=400", folder=disk)
    with pytest.raises(SDPOError, match=r"run: cannot be written \(No space left on device\); files saved before"):
        SDPOTrainer(run).train()
    lines = (disk / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)[metrics.STEP] for line in lines[:2]] == [0, 1]


def test_read_only_output_dir(make_run: Callable[..., SDPOConfig], mount: Callable[..., Path]) -> None:
    disk = mount("size=1m", "ro")
    with pytest.raises(SDPOError, match=r"^output_dir=.*/run: cannot be written \(Read-only file system\)$"):
        SDPOTrainer(make_run(folder=disk)).train()


def test_checkpoint_with_any_truncated_file(
    make_run: Callable[..., SDPOConfig], caplog: pytest.LogCaptureFixture
) -> None:
    run, uninterrupted = make_run(), make_run("output_dir=${data.task_args.dir}/../uninterrupted")
    SDPOTrainer(replace(run, max_steps=3)).train()
    SDPOTrainer(replace(uninterrupted, max_steps=3)).train()
    newest = Path(run.output_dir) / "checkpoints" / "step_3"
    files = [path for path in sorted(newest.rglob("*")) if path.is_file()]
    assert {path.name for path in files} >= {"model.safetensors", "config.json", "tokenizer.json", FILE}
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        caplog.clear()
        assert find_newest(newest.parent) == newest.with_name("step_2")
        [message] = caplog.messages
        assert path.name in message
        path.write_bytes(content)
    caplog.clear()
    assert find_newest(newest.parent) == newest
    assert caplog.messages == []

    (newest / "model.safetensors").write_bytes(b"")
    rows = read_rows(uninterrupted)
    SDPOTrainer(replace(run, max_steps=3, resume_mode="auto", optim=replace(run.optim))).train()
    assert read_rows(run) == rows


@STARTS_PROCESSES
def test_killed_sampler_is_restarted(
    make_run: Callable[..., SDPOConfig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uninterrupted = make_run("max_staleness=1", "output_dir=${data.task_args.dir}/../uninterrupted_1")
    SDPOTrainer(uninterrupted).train()
    run = make_run("max_staleness=1")
    submit, submitted = ProcessSampler.submit, []

    def submit_and_kill(sampler: ProcessSampler, *arguments: Any) -> None:
        submit(sampler, *arguments)
        submitted.append(arguments)
        if len(submitted) in (2, 4):
            os.kill(sampler._process.pid or 0, signal.SIGKILL)

    monkeypatch.setattr(ProcessSampler, "submit", submit_and_kill)
    SDPOTrainer(run).train()
    assert [text for text in caplog.messages if "killed" in text] == [
        f"the sampling process was killed by SIGKILL; restart {number} of at most 3" for number in (1, 2)
    ]
    assert_same_run(run, uninterrupted)


@STARTS_PROCESSES
def test_killed_actor_resumes(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/crash.py", "--kills", "3", "--modes", "overlapped", "--folder", tmp_path]
    environment = {**os.environ, "BENCHMARK_RESULTS": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "crash.json").read_text())
    assert (results["survived"], results["tried"]) == (3, 3)


def test_update_with_a_nonfinite_gradient_is_skipped(
    make_run: Callable[..., SDPOConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulate = Actor._accumulate_gradients

    def make_nonfinite(actor: Actor, *arguments: Any) -> Any:
        result = accumulate(actor, *arguments)
        if actor.version == 1:
            next(p for p in actor.student.parameters() if p.grad is not None).grad.fill_(torch.nan)  # type: ignore
        return result

    monkeypatch.setattr(Actor, "_accumulate_gradients", make_nonfinite)
    run = make_run("save_total_limit=4")
    SDPOTrainer(run).train()
    assert [row[metrics.SKIPPED_UPDATES] for row in read_rows(run)[1:]] == [0, 1, 0, 0]
    before, skipped, after = (load_weights(run, step) for step in (1, 2, 3))
    assert all(torch.equal(before[name], skipped[name]) for name in before)
    assert not all(torch.equal(before[name], after[name]) for name in before)


@STARTS_PROCESSES
def test_out_of_memory_halves_the_micro_batch(make_run: Callable[..., SDPOConfig], tmp_path: Path) -> None:
    """Train in a process that may allocate 60 MB after it has loaded the model."""
    run = make_run(
        "max_steps=2", "save_steps=0", "data.train_batch_size=40", "rollout.n=32", "eval.val_before_train=false"
    )
    limited = """
import resource
from sdpo import load_config, SDPOTrainer
from sdpo.trainer.actor.actor import Actor

update_policy = Actor.update_policy

def update_with_limited_memory(*args, **kwargs):
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 60_000_000, -1))
    try:
        return update_policy(*args, **kwargs)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))

Actor.update_policy = update_with_limited_memory
config = load_config("run.yaml", ["actor.max_tokens_per_micro_batch=1000000"])
SDPOTrainer(config).train()
"""
    (tmp_path / "limited.py").write_text(limited)
    SDPOTrainer(replace(run, output_dir=f"{tmp_path}/unlimited")).train()
    shutil.copy(tmp_path / "unlimited" / "run.yaml", tmp_path / "run.yaml")
    text = (tmp_path / "run.yaml").read_text().replace(f"{tmp_path}/unlimited", f"{tmp_path}/run")
    (tmp_path / "run.yaml").write_text(text)
    done = subprocess.run([sys.executable, "limited.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert any(line.startswith("out of memory in a micro-batch; ") for line in done.stderr.splitlines())
    one, two = (read_rows(replace(run, output_dir=f"{tmp_path}/{name}")) for name in ("unlimited", "run"))
    for row, other in zip(one, two, strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-5)
