"""The sampler's role: rollouts of a batch of prompts, with weights whose version is known.

Both kinds have the same calls. ``LocalSampler`` works when it is asked to collect, in the actor's process;
``ProcessSampler`` works in a process of its own, on a device of its own, from submit to collect. What samples is an
``Engine``: transformers here, vLLM in ``vllm_engine.py``.
"""

from __future__ import annotations

import atexit
import contextlib
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from sdpo.config.model import ModelConfig
from sdpo.errors import DataError, SDPOError
from sdpo.models.generation.sampling import Completion, SamplingParams, sample_responses
from sdpo.models.loading import load_model
from sdpo.models.lora.adapters import MergedParameters
from sdpo.models.multimodal.processor import TokenPrompt, load_reader
from sdpo.models.multimodal.vision_tower import VisionAdapter
from sdpo.trainer.rollout.weight_sync import SharedWeights, WeightChecksum, compute_weight_checksum, copy_parameters


@dataclass(frozen=True)
class RolloutBatch:
    """``n`` responses to each prompt of a step.

    Attributes:
        responses: one list a prompt.
        version: how often the weights that sampled them had been updated.
        seconds: what sampling took.
    """

    responses: list[list[Completion]]
    version: int
    seconds: float


class Sampler(Protocol):
    def submit(self, prompts: Sequence[TokenPrompt], seed: int) -> None:
        """Ask for rollouts of these prompts, with the weights loaded last."""

    def collect(self, timeout: float | None = None) -> RolloutBatch | None:
        """The rollouts asked for, once they are there; None if that takes another process longer than ``timeout``."""

    def load_weights(self, student: nn.Module, version: int) -> None:
        """Sample with these weights from now on; never called between submit and collect."""

    def close(self) -> None:
        """Let go of processes and memory."""


class Engine(Protocol):
    """A model that samples."""

    def sample(self, prompts: Sequence[TokenPrompt], seed: int) -> list[list[Completion]]:
        """Responses to each prompt, in the prompts' order; the same seed gives the same ones."""

    def load(self, parameters: Mapping[str, Tensor], probe: WeightChecksum | None) -> None:
        """Take these weights, named as the model's; compare what comes of them with the probe, if there is one."""

    def close(self) -> None:
        """Let go of memory."""


class TransformersEngine:
    """Samples with a model of transformers.

    Args:
        is_student: the model is the student itself, which no weights have to be loaded into, and not a copy of it.
    """

    def __init__(
        self,
        model: nn.Module,
        decoding: SamplingParams,
        vision: VisionAdapter | None = None,
        *,
        is_student: bool = False,
    ) -> None:
        self._model = model
        self._decoding = decoding
        self._vision = vision
        self._is_student = is_student

    @classmethod
    def from_config(
        cls, config: ModelConfig, decoding: SamplingParams, device: torch.device, max_pixels: int
    ) -> TransformersEngine:
        model, reader = load_model(config, device), load_reader(config, max_pixels)
        return cls(model, decoding, VisionAdapter(model, reader) if reader is not None else None)

    def sample(self, prompts: Sequence[TokenPrompt], seed: int) -> list[list[Completion]]:
        return sample_responses([(self._model, 1.0)], prompts, self._decoding, seed, self._vision)

    def load(self, parameters: Mapping[str, Tensor], probe: WeightChecksum | None) -> None:
        if not self._is_student:
            copy_parameters(parameters, self._model)

    def close(self) -> None:
        pass


class LocalSampler:
    """Samples in the actor's process.

    Args:
        engine: what samples.
        probes: whether each hand-over comes with a probe of the student.
    """

    def __init__(self, engine: Engine, probes: bool = False) -> None:
        self._engine = engine
        self._probes = probes
        self._version = 0
        self._request: tuple[Sequence[TokenPrompt], int] | None = None

    def submit(self, prompts: Sequence[TokenPrompt], seed: int) -> None:
        self._request = (prompts, seed)

    def collect(self, timeout: float | None = None) -> RolloutBatch:
        assert self._request is not None, "collect before submit"
        started = time.perf_counter()
        responses = self._engine.sample(*self._request)
        self._request = None
        return RolloutBatch(responses, self._version, time.perf_counter() - started)

    def load_weights(self, student: nn.Module, version: int) -> None:
        probe = compute_weight_checksum(student) if self._probes else None
        self._engine.load(MergedParameters(student), probe)
        self._version = version

    def close(self) -> None:
        self._engine.close()


class ProcessSampler:
    """Samples in a process of its own while the actor learns.

    A process that is killed from outside is started again with the weights and the request that it had, so that the
    same rollouts come of it.

    Args:
        student: whose weights are sampled with from the start.
        build_engine: called in that process.
        num_threads: CPU threads of that process; torch's choice if None.
        probes: whether each hand-over comes with a probe of the student.
        max_restarts: how often it is started again in all.
        tell: hears of each time.
    """

    def __init__(
        self,
        student: nn.Module,
        build_engine: Callable[[], Engine],
        num_threads: int | None,
        probes: bool = False,
        max_restarts: int = 0,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._weights = SharedWeights(student)
        self._build_engine = build_engine
        self._num_threads = num_threads
        self._probes = probes
        self._restarts_left = max_restarts
        self._tell = tell
        self._loaded: tuple[Any, ...] | None = None  # the last hand-over
        self._asked: tuple[Any, ...] | None = None  # the request that has not been answered
        self._start()
        atexit.register(self.close)  # else multiprocessing would wait for the process, which no SIGTERM ends

    def submit(self, prompts: Sequence[TokenPrompt], seed: int) -> None:
        self._asked = ("sample", prompts, seed)
        self._send(self._asked)

    def collect(self, timeout: float | None = None) -> RolloutBatch | None:
        try:
            if timeout is not None and not self._connection.poll(timeout):
                return None
            outcome = self._receive()
        except _DISCONNECT_ERRORS:
            self._restart()
            return self.collect(timeout)
        assert isinstance(outcome, RolloutBatch)
        self._asked = None
        return outcome

    def load_weights(self, student: nn.Module, version: int) -> None:
        self._weights.write(student)
        self._loaded = ("weights", version, compute_weight_checksum(student) if self._probes else None)
        self._send(self._loaded)

    def close(self) -> None:
        atexit.unregister(self.close)
        self._connection.close()
        self._process.join(timeout=1)
        if self._process.is_alive():  # sampling or starting, which nobody waits for any more
            self._process.kill()
            self._process.join()

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(theirs, self._weights, self._build_engine, self._num_threads),
            name="sdpo-sampler",
            daemon=True,
        )
        with _ignore_signals():
            self._process.start()
        theirs.close()

    def _restart(self) -> None:
        """Start the process again where it was.

        Raises:
            DataError: it has been killed too often.
            RuntimeError: it ended by itself.
        """
        self._process.join(timeout=5)
        code = self._process.exitcode
        if code is None or code >= 0:
            raise RuntimeError(f"the sampler's process ended with exit code {code}")
        how = f"the sampler's process was killed by {signal.Signals(-code).name}"
        if self._restarts_left == 0:
            raise DataError(
                f"sampler: {how}, and may not be started again (rollout.max_restarts); "
                "if memory ran out, lower rollout.max_num_seqs or rollout.max_response_length"
            )
        self._restarts_left -= 1
        self._tell(f"{how}; it is started again, {self._restarts_left} more times at most")
        self._connection.close()
        self._start()
        for request in (self._loaded, self._asked):
            if request is not None:
                self._send(request)

    def _send(self, request: tuple[Any, ...]) -> None:
        try:
            self._connection.send(request)
        except _DISCONNECT_ERRORS:
            with contextlib.suppress(*_DISCONNECT_ERRORS):
                while True:  # what it sent last tells why it is gone
                    self._receive()
            self._restart()  # which sends the request

    def _receive(self) -> Any:
        outcome = self._connection.recv()
        if isinstance(outcome, SDPOError):
            raise outcome
        if isinstance(outcome, str):
            raise RuntimeError(f"the sampler failed:\n{outcome}")
        return outcome


# What a connection raises once the process at its other end is gone.
_DISCONNECT_ERRORS = (EOFError, BrokenPipeError, ConnectionResetError)
# Signals that the actor handles; it closes the connection once it has saved.
_HANDLED_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def _ignore_signals() -> Iterator[None]:
    """A process started in here never hears what a terminal or a batch system sends to every process of a run.

    Not even while it starts; it ends with the actor, whose part it is to save first.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may say
        yield
        return
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in _HANDLED_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _serve(
    connection: Connection, weights: SharedWeights, build_engine: Callable[[], Engine], num_threads: int | None
) -> None:
    for number in _HANDLED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    version = 0
    try:
        engine = build_engine()
        engine.load(weights.tensors, None)
        while True:
            try:
                request: tuple[Any, ...] = connection.recv()
            except _DISCONNECT_ERRORS:
                return
            if request[0] == "weights":
                _, version, probe = request
                engine.load(weights.tensors, probe)
                continue
            started = time.perf_counter()
            _, prompts, seed = request
            responses = engine.sample(prompts, seed)
            connection.send(RolloutBatch(responses, version, time.perf_counter() - started))
    except Exception as error:  # whatever it is, the actor's process reports it, if it is still there
        with contextlib.suppress(*_DISCONNECT_ERRORS):
            connection.send(error if isinstance(error, SDPOError) else traceback.format_exc())
