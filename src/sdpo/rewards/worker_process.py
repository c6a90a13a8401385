"""A Python process that answers questions, and is killed when an answer takes too long.

It is a plain subprocess: processes that may have no children of ``multiprocessing`` (daemons) can ask too, and nobody's
``__main__`` is imported again.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import wait
from typing import Any

START_SECONDS = 120.0  # imports, on a busy machine with a cold disk


class WorkerTimeout(Exception):
    """The answer took too long, or the process died of the question."""


class WorkerProcess:
    """Started when first asked, and again after it was killed.

    Args:
        serve: ``module:function`` that runs in the process: it prints a line when it is ready, and then answers every
            line of JSON in its input by a line of JSON.
        arguments: of that function.
    """

    def __init__(self, serve: str, arguments: Sequence[str] = ()) -> None:
        self._serve = serve
        self._arguments = arguments
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self._forget)

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Ask one question; safe in every thread, one question at a time.

        Args:
            request: as JSON.
            seconds: the most that the answer may take, without the start of the process and without waiting for others.

        Raises:
            WorkerTimeout: it took longer, or the process died. The next question starts another.
            RuntimeError: the process does not start.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            try:
                reply = self._exchange(json.dumps(request), seconds)
            except BaseException:  # also Ctrl-C: the next question must not get this one's answer
                self.close()
                raise
        answer: dict[str, Any] = json.loads(reply)
        return answer

    def _start(self) -> None:
        self.close()
        module, _, function = self._serve.partition(":")
        code = (
            "import json, sys; sys.path[:], arguments = map(json.loads, sys.argv[1:]); "
            f"from {module} import {function}; {function}(*arguments)"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(sys.path), json.dumps(list(self._arguments))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C in the terminal is for us; the worker ends with its input
        )
        try:
            self._exchange(None, START_SECONDS)
        except BaseException as error:
            self.close()
            if isinstance(error, WorkerTimeout):
                raise RuntimeError(f"the process of {self._serve} did not start; see its error above") from None
            raise

    def _exchange(self, line: str | None, seconds: float) -> str:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        try:
            if line is not None:
                self._process.stdin.write(line + "\n")
                self._process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerTimeout from error
        reply = self._process.stdout.readline() if wait([self._process.stdout.fileno()], seconds) else ""
        if not reply:
            raise WorkerTimeout
        return reply

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        _close_pipes(process)

    def _forget(self) -> None:
        """In a forked child: the process is the parent's, and the lock may be held by a thread that is not here."""
        process, self._process, self._lock = self._process, None, threading.Lock()
        if process is not None:
            _close_pipes(process)
            process.returncode = 0  # not ours to wait for


def take_output() -> Any:
    """In the process: its output as a stream for the answers alone; what else is printed goes to the errors."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return replies


def _close_pipes(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what could not be written is of no use to a dead process
                pipe.close()
