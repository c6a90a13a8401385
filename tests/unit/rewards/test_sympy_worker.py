"""The worker process that parses expressions: timeouts in every thread, and its end with the owner."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from decimal import Decimal

import pytest

from sdpo.rewards import worker_process
from sdpo.rewards.geo3k import sympy_worker
from sdpo.rewards.geo3k.sympy_worker import compare
from sdpo.rewards.worker_process import WorkerProcess, WorkerTimeout

pytest.importorskip("math_verify")

LONG = 60.0  # more than any test takes on a busy machine
ENDLESS = "(x+y+z)^{300}"


def worker() -> subprocess.Popen[str]:
    process = sympy_worker._worker._process
    assert process is not None
    return process


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def test_numbers_are_returned_and_other_expressions_compared() -> None:
    numbers = compare(r"\frac{1}{4}", r"\sqrt{4}", LONG)
    assert (numbers.is_readable, numbers.value, numbers.truth) == (True, Decimal("0.25"), Decimal(2))
    equal = compare("2x + 3", "3 + 2x", LONG)
    assert (equal.is_readable, equal.is_equal, equal.value, equal.truth) == (True, True, None, None)
    assert not compare("2x + 3", "3 + 2y", LONG).is_equal
    assert not compare(r"\frac{", "5", LONG).is_readable
    assert not compare("10^{101}", "5", LONG).is_readable


def test_timeout_in_any_thread_does_not_affect_the_next_expression() -> None:
    compare("1 + x", "x", LONG)
    before = worker()
    caught: list[float] = []

    def ask() -> None:
        start = time.monotonic()
        with pytest.raises(WorkerTimeout):
            compare(ENDLESS, "5", 0.5)
        caught.append(time.monotonic() - start)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(LONG)
    assert len(caught) == 1 and 0.4 < caught[0] < 20
    assert before.poll() == -signal.SIGKILL
    assert compare("2 + x", "x + 2", LONG).is_equal
    assert worker().pid != before.pid


def test_each_thread_gets_its_answers() -> None:
    values: dict[int, Decimal | None] = {}

    def ask(number: int) -> None:
        values[number] = compare(rf"\sqrt{{{number**2}}}", "1 + x", LONG).value

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2, 22)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert values == {number: Decimal(number) for number in range(2, 22)}


def test_dead_worker_is_replaced() -> None:
    compare("3 + x", "x", LONG)
    worker().kill()
    worker().wait()
    assert compare("4 + x", "x + 4", LONG).is_equal


def test_interruption_leaves_no_stale_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    compare("5 + x", "x", LONG)
    wait = worker_process.wait

    def interrupted(*_: object) -> list[object]:
        monkeypatch.setattr(worker_process, "wait", wait)
        raise KeyboardInterrupt

    monkeypatch.setattr(worker_process, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare("6 + x", "x + 6", LONG)
    assert not compare("7 + x", "x", LONG).is_equal


def _ask_in_child(queue: multiprocessing.Queue[bool]) -> None:
    queue.put(compare("8 + x", "x + 8", LONG).is_equal)
    sympy_worker._worker.close()  # a forked child leaves without atexit


def test_forked_daemon_has_a_separate_worker() -> None:
    compare("9 + x", "x", LONG)
    before = worker()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_ask_in_child, args=(queue,), daemon=True)
    child.start()
    assert queue.get(timeout=LONG) is True
    child.join(LONG)
    assert child.exitcode == 0
    assert worker() is before and before.poll() is None
    assert compare("10 + x", "x + 10", LONG).is_equal


OWNER = """
import sys, threading, time
from sdpo.rewards.geo3k import sympy_worker
sympy_worker.compare("1 + x", "x", 60)
print(sympy_worker._worker._process.pid, flush=True)
if sys.argv[1] == "hang":
    sympy_worker.compare("(x+y+z)^{300}", "5", 2)
elif sys.argv[1] == "idle":
    time.sleep(60)
"""


@pytest.mark.parametrize("ending", ["exit", "idle", "hang"])
def test_worker_ends_with_its_owner(ending: str) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER, ending], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        if ending == "hang":
            time.sleep(1)  # the question is on its way
        if ending != "exit":
            owner.kill()
    wait_until(lambda: not is_running(pid))


def test_worker_that_cannot_start_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = WorkerProcess("sdpo.rewards.geo3k.sympy_worker:_serve")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start"):
        fresh.request({}, 1)
