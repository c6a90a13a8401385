"""The sampler's role: rollouts of a batch of prompts, with weights whose version is known.

Both kinds have the same calls. ``LocalSampler`` works when it is asked to collect, in the learner's process;
``ProcessSampler`` works in a process of its own, on a device of its own, from submit to collect. What samples is an
``Engine``: transformers here, vLLM in ``vllm_engine.py``.
"""

from __future__ import annotations

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

from sdpo.config import ModelConfig
from sdpo.embedded.weights import Probe, SharedWeights, compute_probe, copy_parameters
from sdpo.errors import UserError
from sdpo.models.decoding import Decoding, Response, sample_responses
from sdpo.models.loading import load_model
from sdpo.models.processing import TokenPrompt, load_reader
from sdpo.models.vision import Vision


@dataclass(frozen=True)
class Rollouts:
    """``n`` responses to each prompt of a step.

    Attributes:
        responses: one list a prompt.
        version: how often the weights that sampled them had been updated.
        seconds: what sampling took.
    """

    responses: list[list[Response]]
    version: int
    seconds: float


class Sampler(Protocol):
    def submit(self, prompts: Sequence[TokenPrompt], seed: int) -> None:
        """Ask for rollouts of these prompts, with the weights loaded last."""

    def collect(self) -> Rollouts:
        """The rollouts asked for, once they are there."""

    def load_weights(self, student: nn.Module, version: int) -> None:
        """Sample with these weights from now on; never called between submit and collect."""

    def close(self) -> None:
        """Let go of processes and memory."""


class Engine(Protocol):
    """A model that samples."""

    def sample(self, prompts: Sequence[TokenPrompt], seed: int) -> list[list[Response]]:
        """Responses to each prompt, in the prompts' order; the same seed gives the same ones."""

    def load(self, parameters: Mapping[str, Tensor], probe: Probe | None) -> None:
        """Take these weights, named as the student's; compare what comes of them with the probe, if there is one."""

    def close(self) -> None:
        """Let go of memory."""


class TransformersEngine:
    """Samples with a model of transformers: a copy of the student, or the student itself."""

    def __init__(self, model: nn.Module, decoding: Decoding, vision: Vision | None = None) -> None:
        self._model = model
        self._decoding = decoding
        self._vision = vision

    @classmethod
    def from_config(
        cls, config: ModelConfig, decoding: Decoding, device: torch.device, max_pixels: int
    ) -> TransformersEngine:
        model, reader = load_model(config, device), load_reader(config, max_pixels)
        return cls(model, decoding, Vision(model, reader) if reader is not None else None)

    def sample(self, prompts: Sequence[TokenPrompt], seed: int) -> list[list[Response]]:
        return sample_responses([(self._model, 1.0)], prompts, self._decoding, seed, self._vision)

    def load(self, parameters: Mapping[str, Tensor], probe: Probe | None) -> None:
        copy_parameters(parameters, self._model)

    def close(self) -> None:
        pass


class LocalSampler:
    """Samples in the learner's process.

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

    def collect(self) -> Rollouts:
        assert self._request is not None, "collect before submit"
        started = time.perf_counter()
        responses = self._engine.sample(*self._request)
        self._request = None
        return Rollouts(responses, self._version, time.perf_counter() - started)

    def load_weights(self, student: nn.Module, version: int) -> None:
        probe = compute_probe(student) if self._probes else None
        self._engine.load(dict(student.named_parameters()), probe)
        self._version = version

    def close(self) -> None:
        self._engine.close()


class ProcessSampler:
    """Samples in a process of its own while the learner learns.

    Args:
        student: whose weights are sampled with from the start.
        build_engine: called in that process.
        num_threads: CPU threads of that process; torch's choice if None.
        probes: whether each hand-over comes with a probe of the student.
    """

    def __init__(
        self,
        student: nn.Module,
        build_engine: Callable[[], Engine],
        num_threads: int | None,
        probes: bool = False,
    ) -> None:
        context = mp.get_context("spawn")
        self._weights = SharedWeights(student)
        self._probes = probes
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(theirs, self._weights, build_engine, num_threads),
            name="sdpo-sampler",
            daemon=True,
        )
        with _deaf_to_ctrl_c():
            self._process.start()
        theirs.close()

    def submit(self, prompts: Sequence[TokenPrompt], seed: int) -> None:
        self._send(("sample", prompts, seed))

    def collect(self) -> Rollouts:
        outcome = self._receive()
        assert isinstance(outcome, Rollouts)
        return outcome

    def load_weights(self, student: nn.Module, version: int) -> None:
        self._weights.write(student)
        self._send(("weights", version, compute_probe(student) if self._probes else None))

    def close(self) -> None:
        self._connection.close()
        self._process.join(timeout=1)
        if self._process.is_alive():  # sampling or starting, which nobody waits for any more
            self._process.terminate()
            self._process.join()

    def _send(self, request: tuple[Any, ...]) -> None:
        try:
            self._connection.send(request)
        except _GONE:
            while True:  # what it sent last tells why it is gone
                self._receive()

    def _receive(self) -> Any:
        try:
            outcome = self._connection.recv()
        except _GONE:
            self._process.join(timeout=5)
            raise RuntimeError(f"the sampler's process ended with exit code {self._process.exitcode}") from None
        if isinstance(outcome, UserError):
            raise outcome
        if isinstance(outcome, str):
            raise RuntimeError(f"the sampler failed:\n{outcome}")
        return outcome


# What a connection raises once the process at its other end is gone.
_GONE = (EOFError, BrokenPipeError, ConnectionResetError)


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """A process started in here never hears Ctrl-C, which a terminal sends to every process, even while it starts."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may say
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _serve(
    connection: Connection, weights: SharedWeights, build_engine: Callable[[], Engine], num_threads: int | None
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the learner's to handle; it closes the connection
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    version = 0
    try:
        engine = build_engine()
        engine.load(weights.tensors, None)
        while True:
            try:
                request: tuple[Any, ...] = connection.recv()
            except _GONE:
                return
            if request[0] == "weights":
                _, version, probe = request
                engine.load(weights.tensors, probe)
                continue
            started = time.perf_counter()
            _, prompts, seed = request
            responses = engine.sample(prompts, seed)
            connection.send(Rollouts(responses, version, time.perf_counter() - started))
    except Exception as error:  # whatever it is, the learner's process reports it, if it is still there
        with contextlib.suppress(*_GONE):
            connection.send(error if isinstance(error, UserError) else traceback.format_exc())
