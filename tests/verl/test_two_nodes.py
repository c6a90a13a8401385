"""``configs/geo3k_2nodes.yaml`` on two Ray nodes: two raylets on one machine, with placeholder GPUs."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from sdpo.observability import metrics
from sdpo.rewards.toy.figures import Figures

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
LIMIT = 300  # seconds for a node to appear

Start = Callable[..., Any]


class Nodes:
    """A Ray head and nodes that join it: raylets in separate process groups, each with one placeholder GPU."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("", 0))
            self.address = f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        # A separate folder: Ray records a cluster in its default folder, and other runs would join it.
        self.temporary = tempfile.mkdtemp(prefix="nodes-", dir="/tmp")
        head = ["--head", f"--port={self.address.rpartition(':')[2]}", f"--temp-dir={self.temporary}"]
        self.add(*head, "--include-dashboard=false")
        self.wait_for(1)

    def add(self, *arguments: str) -> subprocess.Popen[bytes]:
        arguments = arguments or (f"--address={self.address}",)
        command = [RAY, "start", "--block", "--num-gpus=1", "--num-cpus=16", "--object-store-memory=200000000"]
        with (self.folder / f"node{len(self.processes)}.log").open("w") as log:
            node = subprocess.Popen(
                [*command, "--disable-usage-stats", *arguments], stdout=log, stderr=log, start_new_session=True
            )
        self.processes.append(node)
        return node

    def wait_for(self, count: int, other_than: Collection[str] = ()) -> list[str]:
        """Wait until this many nodes are alive, and return their IDs.

        Ray detects a killed node late: these IDs must not be exactly ``other_than``.
        """
        code = f"import ray; ray.init(address={self.address!r}, log_to_driver=False, logging_level=40); "
        code += "print(*(node['NodeID'] for node in ray.nodes() if node['Alive']))"
        end = time.monotonic() + LIMIT
        while time.monotonic() < end and self.processes[-1].poll() is None:
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            names = done.stdout.split()
            if len(names) == count and set(names) != set(other_than):
                return names
            time.sleep(1)
        log = self.folder / f"node{len(self.processes) - 1}.log"
        raise TimeoutError(f"no {count} nodes: {log.read_text()[-3000:]} {done.stdout} {done.stderr[-2000:]}")

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """Send SIGKILL to all processes of the node; unlike after a power loss, connections are closed."""
        family = [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=30)


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", str(LIMIT))  # Ray's default of 30 s is too short
    cluster = Nodes(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    for node in cluster.processes:
        if node.poll() is None:
            cluster.kill(node)
    shutil.rmtree(cluster.temporary, ignore_errors=True)


def test_run_on_two_nodes_resumes_after_the_loss_of_a_node(
    nodes: Nodes, start: Start, tmp_path: Path, metrics_of: Callable[[Path], dict[int, dict[str, Any]]]
) -> None:
    """Not covered on one machine: NCCL, a file system that both nodes mount, two IP addresses."""
    task, run = tmp_path / "task", tmp_path / "run"
    Figures(str(task), pretrain_steps=0, num_train=64, num_test=4).prepare()
    settings = {
        "output_dir": run,
        "model.path": task / "model",
        "data.task": "figures",
        "data.task_args.dir": task,
        "data.task_args.pretrain_steps": 0,
        "data.task_args.num_train": 64,
        "data.task_args.num_test": 4,
        "data.train_files": f"[{task}/train.parquet]",
        "data.val_files": f"[{task}/test.parquet]",
        "data.train_batch_size": 4,
        "rollout.n": 2,
        "rollout.max_response_length": 8,
        "eval_steps": 0,
        "eval.val_before_train": "false",
        "save_steps": 1,
        "rollout.n_gpus_per_node": 1,
        "trainer.n_gpus_per_node": 1,
        "trainer.test_freq": -1,
    }

    def train(max_steps: int, resume_mode: str) -> Any:
        overrides = [f"{key}={value}" for key, value in settings.items()]
        file = str(ROOT / "configs" / "geo3k_2nodes.yaml")
        command = [sys.executable, "-m", "sdpo.cli", "verl", file, *overrides]
        return start(*command, f"max_steps={max_steps}", f"resume_mode={resume_mode}")

    worker = nodes.add()
    names = nodes.wait_for(2)
    running = train(50, "disable")
    assert running.wait(until=lambda: 2 in metrics_of(run)) is None, running.tail()
    nodes.kill(worker)
    assert running.wait() not in (None, 0), "a run without one of its nodes must not end as if all were well"
    reached = max(metrics_of(run))
    newest = int((run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert reached - newest <= settings["save_steps"] and newest >= 2

    nodes.add()
    nodes.wait_for(2, other_than=names)
    running = train(newest + 1, "auto")
    assert running.wait() == 0, running.tail()
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [newest + 1]
    rows = metrics_of(run)
    assert all(rows[step][metrics.DISTILLATION_LOSS] > 0 for step in range(1, newest + 2))
    assert rows[newest + 1][metrics.STALENESS] == 1, "the batch sampled ahead is in the checkpoint"
