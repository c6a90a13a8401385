"""The sampler in a separate process, which samples while the trainer trains on the previous batch.

The trainer sends ``SyncWeights`` and ``Generate`` through a pipe and receives a ``RolloutBatch`` per ``Generate``, or a
``Failure`` before the process ends. Weights go through shared memory. Log records of the process are sent through the
pipe too and handled in the trainer's process.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import logging.handlers
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
import torch.multiprocessing as mp
from torch import nn

from sdpo.errors import DataError, SDPOError
from sdpo.models.multimodal.processor import TokenPrompt
from sdpo.trainer.rollout.base import Engine, RolloutBatch
from sdpo.trainer.rollout.weight_sync import SharedWeights, WeightChecksum, compute_weight_checksum

logger = logging.getLogger(__name__)

# Raised by a connection whose other process has ended.
_DISCONNECT_ERRORS = (EOFError, BrokenPipeError, ConnectionResetError)
# Handled by the trainer, which saves a checkpoint and then closes the connection.
_HANDLED_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class SyncWeights:
    """Load the weights that are in shared memory."""

    policy_version: int
    checksum: WeightChecksum | None


@dataclass(frozen=True)
class Generate:
    """Sample responses to these prompts."""

    prompts: Sequence[TokenPrompt]
    seed: int


@dataclass(frozen=True)
class Failure:
    """The exception that ended the sampling process.

    Attributes:
        error: the exception itself if it is an ``SDPOError``, to be raised by the trainer.
    """

    error: SDPOError | None
    traceback: str


class ProcessSampler:
    """Samples in a separate process.

    If the process is killed, it is restarted with the same weights and the same request, so the rollouts are the same.

    Args:
        student: provides the first weights.
        build_engine: called in the new process.
        num_threads: CPU threads of that process; None: torch's default.
        verify_weights: send a checksum of the student with every weight sync.
        max_restarts: maximum number of restarts in total.
    """

    def __init__(
        self,
        student: nn.Module,
        build_engine: Callable[[], Engine],
        num_threads: int | None,
        *,
        verify_weights: bool = False,
        max_restarts: int = 0,
    ) -> None:
        self._weights = SharedWeights(student)
        self._build_engine = build_engine
        self._num_threads = num_threads
        self._verify_weights = verify_weights
        self._max_restarts = max_restarts
        self._num_restarts = 0
        self._last_sync: SyncWeights | None = None
        self._pending: Generate | None = None
        self._start()
        # The process ignores SIGTERM, so multiprocessing's exit handler would wait for it forever.
        atexit.register(self.close)

    def submit(self, prompts: Sequence[TokenPrompt], seed: int) -> None:
        self._pending = Generate(prompts, seed)
        self._send(self._pending)

    def collect(self, timeout: float | None = None) -> RolloutBatch | None:
        try:
            while timeout is None or self._connection.poll(timeout):
                rollouts = self._receive()
                if rollouts is not None:
                    self._pending = None
                    return rollouts
        except _DISCONNECT_ERRORS:
            self._restart()
            return self.collect(timeout)
        return None

    def load_weights(self, student: nn.Module, policy_version: int) -> None:
        self._weights.write(student)
        self._last_sync = SyncWeights(
            policy_version, compute_weight_checksum(student) if self._verify_weights else None
        )
        self._send(self._last_sync)

    def close(self) -> None:
        atexit.unregister(self.close)
        self._connection.close()
        self._process.join(timeout=1)
        if self._process.is_alive():  # it is still sampling or starting
            self._process.kill()
            self._process.join()

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self._connection, remote = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(remote, self._weights, self._build_engine, self._num_threads, logger.getEffectiveLevel()),
            name="sdpo-sampler",
            daemon=True,
        )
        with _ignore_signals():
            self._process.start()
        remote.close()

    def _restart(self) -> None:
        """Start the process again and repeat the last weight sync and the pending request.

        Raises:
            DataError: there are no restarts left.
            RuntimeError: the process was not killed but ended.
        """
        self._process.join(timeout=5)
        code = self._process.exitcode
        if code is None or code >= 0:
            raise RuntimeError(f"the sampling process ended with exit code {code}")
        cause = f"the sampling process was killed by {signal.Signals(-code).name}"
        if self._num_restarts == self._max_restarts:
            raise DataError(
                f"rollout.max_restarts={self._max_restarts}: {cause} and no restart is left; "
                "if memory ran out, lower rollout.max_num_seqs or rollout.max_response_length"
            )
        self._num_restarts += 1
        logger.warning(f"{cause}; restart {self._num_restarts} of at most {self._max_restarts}")
        self._connection.close()
        self._start()
        for message in (self._last_sync, self._pending):
            if message is not None:
                self._send(message)

    def _send(self, message: SyncWeights | Generate) -> None:
        try:
            self._connection.send(message)
        except _DISCONNECT_ERRORS:
            with contextlib.suppress(*_DISCONNECT_ERRORS):
                while True:  # raises the failure that the process sent last, if there is one
                    self._receive()
            self._restart()  # also sends the message

    def _receive(self) -> RolloutBatch | None:
        """Receive a message and raise a failure; None if it was a log record."""
        message: RolloutBatch | Failure | logging.LogRecord = self._connection.recv()
        if isinstance(message, logging.LogRecord):
            logging.getLogger(message.name).handle(message)
            return None
        if isinstance(message, Failure):
            raise message.error or RuntimeError(f"the sampling process failed:\n{message.traceback}")
        return message


@contextlib.contextmanager
def _ignore_signals() -> Iterator[None]:
    """Start child processes that ignore SIGINT and SIGTERM, also before ``_serve`` runs.

    A terminal or a batch system sends these signals to all processes of a run. The trainer saves a checkpoint and then
    ends the child.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        yield
        return
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in _HANDLED_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _ForwardLogs(logging.handlers.QueueHandler):
    """Sends log records to the trainer's process."""

    def enqueue(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(*_DISCONNECT_ERRORS):
            self.queue.send(record)  # type: ignore[attr-defined]


def _serve(
    connection: Connection,
    weights: SharedWeights,
    build_engine: Callable[[], Engine],
    num_threads: int | None,
    log_level: int,
) -> None:
    """Answer requests until the connection is closed."""
    for number in _HANDLED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    package = logging.getLogger("sdpo")
    package.setLevel(log_level)
    package.addHandler(_ForwardLogs(connection))  # type: ignore[arg-type]
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    policy_version = 0
    try:
        engine = build_engine()
        engine.load(weights.tensors, None)
        while True:
            try:
                message: SyncWeights | Generate = connection.recv()
            except _DISCONNECT_ERRORS:
                return
            if isinstance(message, SyncWeights):
                policy_version = message.policy_version
                engine.load(weights.tensors, message.checksum)
                continue
            started = time.perf_counter()
            responses = engine.sample(message.prompts, message.seed)
            connection.send(RolloutBatch(responses, policy_version, time.perf_counter() - started))
    except Exception as error:  # any exception is reported by the trainer
        with contextlib.suppress(*_DISCONNECT_ERRORS):
            connection.send(Failure(error if isinstance(error, SDPOError) else None, traceback.format_exc()))
