"""Comparison of two mathematical expressions by math-verify, in a process with a time limit.

sympy evaluates ``9^{9^{9^9}}`` on request and holds the interpreter's lock meanwhile: neither a thread nor a signal
handler can end it. math-verify's own time limit is a signal handler, and works in the main thread only. So one worker
process, started at first use, parses the expressions. It is killed when it takes too long (``worker_process.py``).
"""

from __future__ import annotations

import functools
import json
import os
import sys
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from sdpo.rewards.worker_process import WorkerProcess

MAX_MEMORY = 2 << 30  # bytes of the worker's address space; large numbers exhaust memory before the timeout
DIGITS = 30
MAX_EXPONENT = 100  # of ten; 10^999999999 as a fraction would exhaust the memory of the caller


@dataclass(frozen=True)
class Comparison:
    """Result of comparing an answer with the ground truth.

    Attributes:
        is_readable: whether the answer is an expression, and not a number beyond 10^±100.
        is_equal: whether math-verify finds both equal; False if both have a value, which the caller compares.
        value, truth: values of answer and truth to 30 digits; None for an expression that is not a real number.
    """

    is_readable: bool
    is_equal: bool
    value: Decimal | None
    truth: Decimal | None


@functools.lru_cache(maxsize=4096)
def compare(answer: str, truth: str, seconds: float) -> Comparison:
    """Compare two LaTeX expressions; thread-safe, one comparison at a time.

    Args:
        answer, truth: LaTeX without dollar signs.
        seconds: time limit, without the start of the worker.

    Raises:
        WorkerTimeout: the comparison took longer. Timeouts are not cached, because the machine may have been busy.
    """
    reply = _worker.request({"answer": answer, "truth": truth, "seconds": seconds}, seconds)
    value, of_truth = (None if text is None else Decimal(text) for text in (reply["value"], reply["truth"]))
    return Comparison(reply["is_readable"], reply["is_equal"], value, of_truth)


_worker = WorkerProcess("sdpo.rewards.geo3k.sympy_worker:_serve")


def _serve() -> None:
    """Answer each line of JSON on the input with a line of JSON."""
    import logging
    import resource
    import signal

    from math_verify import LatexExtractionConfig  # noqa: F401  the slow import is done before time is measured

    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    _compare_here("1", "x")  # builds the parser's tables
    print("ready", file=replies)
    for line in sys.stdin:
        request = json.loads(line)
        # SIGALRM's default action ends this process in any state, also after its parent was killed.
        signal.setitimer(signal.ITIMER_REAL, request["seconds"] + 1)
        reply = _compare_here(request["answer"], request["truth"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=replies)


def _compare_here(answer: str, truth: str) -> dict[str, Any]:
    # sympy and its parser raise all kinds of errors on odd input, including RecursionError and MemoryError.
    try:
        given = _parse(answer)
        value = _evaluate(given)
    except Exception:
        given = value = None
    try:
        expected = _parse(truth)
        of_truth = _evaluate(expected)
    except Exception:
        expected = of_truth = None
    is_equal = False
    if given is not None and expected is not None and (value is None or of_truth is None):
        from math_verify import verify

        is_equal = verify([expected], [given], timeout_seconds=None)
    return {"is_readable": given is not None, "is_equal": is_equal, "value": value, "truth": of_truth}


def _parse(latex: str) -> Any:
    from math_verify import LatexExtractionConfig, parse

    config = [LatexExtractionConfig(boxed_match_priority=-1)]
    found = parse(f"${latex}$", config, fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if found else None


def _evaluate(expression: Any) -> str | None:
    if not getattr(expression, "is_number", False):
        return None
    value = expression.evalf(DIGITS, chop=True)
    if not (value.is_Float and value.is_finite) and not value.is_Rational:
        return None
    if abs(Decimal(str(value)).adjusted()) > MAX_EXPONENT:
        raise OverflowError
    return str(value)
