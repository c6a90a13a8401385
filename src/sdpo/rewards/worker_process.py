"""A Python process that answers requests, and is killed when an answer takes too long.

It is a plain subprocess, because daemonic processes cannot have children of ``multiprocessing``, and because no
``__main__`` module is imported again.
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
    """The answer took too long, or the process died."""


class WorkerProcess:
    """Starts its process at the first request, and again after the process was killed.

    Args:
        serve: ``module:function`` that runs in the process. It prints a line when it is ready, and then answers each
            line of JSON on its input with a line of JSON.
        arguments: arguments of the function.
    """

    def __init__(self, serve: str, arguments: Sequence[str] = ()) -> None:
        self._serve = serve
        self._arguments = arguments
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self._forget)

    def request(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send a request and return the answer; thread-safe, one request at a time.

        Args:
            request: converted to JSON.
            seconds: time limit of the answer, without the start of the process and without waiting for other threads.

        Raises:
            WorkerTimeout: the answer took longer, or the process died. The next request starts a new process.
            RuntimeError: the process does not start.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            try:
                reply = self._exchange(json.dumps(request), seconds)
            except BaseException:  # also Ctrl-C: the next request must not get this answer
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
            start_new_session=True,  # so that Ctrl-C does not reach the worker, which ends with its input
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
        """End the process, if it runs."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        _close_pipes(process)

    def _forget(self) -> None:
        """In a forked child: leave the process to the parent, and replace a lock that a missing thread may hold."""
        process, self._process, self._lock = self._process, None, threading.Lock()
        if process is not None:
            _close_pipes(process)
            process.returncode = 0  # the parent waits for it


def take_output() -> Any:
    """In the process: reserve stdout for the answers and redirect all other output to stderr."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return replies


def _close_pipes(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # buffered data for a dead process is discarded
                pipe.close()
