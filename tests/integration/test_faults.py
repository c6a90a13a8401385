"""What can go wrong around a run, made to go wrong: docs/native_trainer.md has the table of these.

A killed actor is in benchmarks/crash.py, of which a part is run here; signals, two runs in one folder and settings
that differ are in tests/unit/trainer/test_resume.py, graders in tests/unit/rewards/test_scoring.py.
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
FORKS = pytest.mark.slow


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults") / "task"


@pytest.fixture
def make_run(task_dir: Path, tmp_path: Path) -> Callable[..., SDPOConfig]:
    def make(*overrides: str, place: Path = tmp_path) -> SDPOConfig:
        return load_config(
            ROOT / "configs" / "hidden_rule.yaml",
            [
                f"output_dir={place}/run",
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
    """A small file system of its own, which only root may make."""
    made: list[Path] = []

    def make(*options: str) -> Path:
        folder = tmp_path / f"mounted{len(made)}"
        folder.mkdir()
        if not shutil.which("mount") or os.geteuid() != 0:
            pytest.skip("only root can mount a file system")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.decode()}")
        made.append(folder)
        return folder

    yield make
    for folder in made:
        subprocess.run(["umount", folder], check=True)


def measure_checkpoint(run: SDPOConfig) -> int:
    SDPOTrainer(replace(run, max_steps=1, output_dir=f"{run.output_dir}_measured")).train()
    return sum(
        path.stat().st_size for path in Path(f"{run.output_dir}_measured/checkpoints").rglob("*") if path.is_file()
    )


def rows_of(run: SDPOConfig) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (Path(run.output_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("timing_s/") and k != metrics.THROUGHPUT} for row in rows]


def weights_of(run: SDPOConfig, step: int = 4) -> dict[str, torch.Tensor]:
    return load_file(Path(run.output_dir) / "checkpoints" / f"step_{step}" / "model.safetensors")


def assert_same_run(one: SDPOConfig, two: SDPOConfig) -> None:
    assert rows_of(one) == rows_of(two)
    weights, others = weights_of(one), weights_of(two)
    assert all(torch.equal(weights[name], others[name]) for name in others)


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(
    make_run: Callable[..., SDPOConfig], mount: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    size = measure_checkpoint(make_run())
    place = mount(f"size={int(2.5 * size) // 1024}k")  # two checkpoints and not three
    run, whole = make_run("save_total_limit=4", place=place), make_run("save_total_limit=4")
    with pytest.raises(
        SDPOError, match=r"step_3: cannot be saved \(.*[nN]o space left.*\); earlier checkpoints are int"
    ):
        SDPOTrainer(run).train()
    folder = place / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step_1", "step_2"]
    caplog.clear()
    assert find_newest(folder) == folder / "step_2"
    assert caplog.messages == []

    subprocess.run(["mount", "-o", f"remount,size={8 * size // 1024}k", place], check=True)
    SDPOTrainer(replace(run, resume_mode="required")).train()
    SDPOTrainer(whole).train()
    assert_same_run(run, whole)


def test_a_disk_too_full_for_a_row_of_metrics(
    make_run: Callable[..., SDPOConfig], mount: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = mount("size=64k")
    learn = Actor.update_policy

    def fill(actor: Actor, *arguments: Any, **how: Any) -> Any:
        if actor.version == 1:
            with pytest.raises(OSError), (place / "filling").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1024))
        return learn(actor, *arguments, **how)

    monkeypatch.setattr(Actor, "update_policy", fill)
    run = make_run("save_steps=0", "max_steps=400", place=place)
    with pytest.raises(SDPOError, match=r"run: cannot be written \(No space left on device\); files saved before"):
        SDPOTrainer(run).train()
    lines = (place / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)[metrics.STEP] for line in lines[:2]] == [0, 1]


def test_a_folder_that_cannot_be_written(make_run: Callable[..., SDPOConfig], mount: Callable[..., Path]) -> None:
    place = mount("size=1m", "ro")
    with pytest.raises(SDPOError, match=r"^output_dir=.*/run: cannot be written \(Read-only file system\)$"):
        SDPOTrainer(make_run(place=place)).train()


def test_a_checkpoint_that_is_cut_short_at_any_file(
    make_run: Callable[..., SDPOConfig], caplog: pytest.LogCaptureFixture
) -> None:
    run, whole = make_run(), make_run("output_dir=${data.task_args.dir}/../whole")
    SDPOTrainer(replace(run, max_steps=3)).train()
    SDPOTrainer(replace(whole, max_steps=3)).train()
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
    rows = rows_of(whole)
    SDPOTrainer(replace(run, max_steps=3, resume_mode="auto", optim=replace(run.optim))).train()
    assert rows_of(run) == rows


@FORKS
def test_a_sampler_that_is_killed(
    make_run: Callable[..., SDPOConfig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = make_run("max_staleness=1", "output_dir=${data.task_args.dir}/../whole_1")
    SDPOTrainer(whole).train()
    run = make_run("max_staleness=1")
    submit, asked = ProcessSampler.submit, []

    def submit_and_kill(sampler: ProcessSampler, *arguments: Any) -> None:
        submit(sampler, *arguments)
        asked.append(arguments)
        if len(asked) in (2, 4):
            os.kill(sampler._process.pid or 0, signal.SIGKILL)

    monkeypatch.setattr(ProcessSampler, "submit", submit_and_kill)
    SDPOTrainer(run).train()
    assert [text for text in caplog.messages if "killed" in text] == [
        f"the sampling process was killed by SIGKILL; restart {number} of at most 3" for number in (1, 2)
    ]
    assert_same_run(run, whole)


@FORKS
def test_a_learner_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/crash.py", "--kills", "3", "--modes", "overlapped", "--folder", tmp_path]
    environment = {**os.environ, "BENCHMARK_RESULTS": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "crash.json").read_text())
    assert (found["survived"], found["tried"]) == (3, 3)


def test_a_gradient_that_is_not_finite(make_run: Callable[..., SDPOConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    accumulate = Actor._accumulate_gradients

    def spoil(actor: Actor, *arguments: Any) -> Any:
        result = accumulate(actor, *arguments)
        if actor.version == 1:
            next(p for p in actor.student.parameters() if p.grad is not None).grad.fill_(torch.nan)  # type: ignore
        return result

    monkeypatch.setattr(Actor, "_accumulate_gradients", spoil)
    run = make_run("save_total_limit=4")
    SDPOTrainer(run).train()
    assert [row[metrics.SKIPPED_UPDATES] for row in rows_of(run)[1:]] == [0, 1, 0, 0]
    before, spoiled, after = (weights_of(run, step) for step in (1, 2, 3))
    assert all(torch.equal(before[name], spoiled[name]) for name in before)
    assert not all(torch.equal(before[name], after[name]) for name in before)


@FORKS
def test_memory_too_small_for_a_micro_batch(make_run: Callable[..., SDPOConfig], tmp_path: Path) -> None:
    """Train in a process that may allocate 60 MB after everything is loaded."""
    run = make_run(
        "max_steps=2", "save_steps=0", "data.train_batch_size=40", "rollout.n=32", "eval.val_before_train=false"
    )
    limited = """
import resource
from sdpo import load_config, SDPOTrainer
from sdpo.trainer.actor.actor import Actor

update_policy = Actor.update_policy

def update_in_little_memory(*arguments, **how):
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 60_000_000, -1))
    try:
        return update_policy(*arguments, **how)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))

Actor.update_policy = update_in_little_memory
config = load_config("run.yaml", ["actor.max_tokens_per_micro_batch=1000000"])
SDPOTrainer(config).train()
"""
    (tmp_path / "limited.py").write_text(limited)
    SDPOTrainer(replace(run, output_dir=f"{tmp_path}/plain")).train()
    shutil.copy(tmp_path / "plain" / "run.yaml", tmp_path / "run.yaml")
    text = (tmp_path / "run.yaml").read_text().replace(f"{tmp_path}/plain", f"{tmp_path}/run")
    (tmp_path / "run.yaml").write_text(text)
    done = subprocess.run([sys.executable, "limited.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert any(line.startswith("out of memory in a micro-batch; ") for line in done.stderr.splitlines())
    one, two = (rows_of(replace(run, output_dir=f"{tmp_path}/{name}")) for name in ("plain", "run"))
    for row, other in zip(one, two, strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-5)
