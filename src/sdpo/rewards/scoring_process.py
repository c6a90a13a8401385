"""Scoring in a separate process, where a call can be ended from any thread.

The timer of ``scoring.py`` interrupts Python's main thread only, and no single call of C code, such as a long regular
expression. Such calls are ended with their process.
"""

from __future__ import annotations

import base64
import faulthandler
import json
import pickle
import sys

from sdpo.errors import DataError, SDPOError
from sdpo.rewards.base import RewardOutput, Row, load_task
from sdpo.rewards.scoring import RewardFailure, describe_timeout, name_row, score_once
from sdpo.rewards.worker_process import WorkerProcess, WorkerTimeout, take_output

# Seconds between the three limits of a call: the timer, which names the line; the process ends itself; we kill it.
GRACE_SECONDS = 2.0


class ScoringProcess:
    """Scores responses in another process, one at a time; thread-safe.

    Args:
        task: name, module or file.
        args: arguments of the task, as JSON.
        timeout: seconds per response.
    """

    def __init__(self, task: str, args: str, timeout: float) -> None:
        self._timeout = timeout
        self._worker = WorkerProcess("sdpo.rewards.scoring_process:_serve", [task, args, str(timeout)])

    def compute_score(self, row: Row, response: str) -> RewardOutput:
        """Score one response.

        Raises:
            RewardFailure: see ``score_once``; also if the process died.
            DataError: the task cannot be loaded, or refuses its data.
        """
        packed = base64.b64encode(pickle.dumps((row, response))).decode()
        try:
            reply = self._worker.request({"packed": packed}, self._timeout + 2 * GRACE_SECONDS)
        except WorkerTimeout:
            reason = f"{describe_timeout(self._timeout)}, or its process died"
            raise RewardFailure(f"{name_row(row)}: {reason}", WorkerTimeout.__name__) from None
        if "refusal" in reply:
            raise DataError(reply["refusal"])
        if "failure" in reply:
            raise RewardFailure(reply["failure"], reply["kind"])
        return RewardOutput(reply["score"], reply["feedback"], tuple(reply["unknown_keys"]))

    def close(self) -> None:
        """End the process; the next response starts a new one."""
        self._worker.close()


def _serve(task: str, args: str, timeout: str) -> None:
    replies = take_output()
    seconds = float(timeout)
    refusal = ""
    try:
        scored_task = load_task(task, json.loads(args))
    except SDPOError as error:
        refusal = str(error)
    print("ready", file=replies)
    for line in sys.stdin:
        if refusal:
            print(json.dumps({"refusal": refusal}), file=replies)
            continue
        row, response = pickle.loads(base64.b64decode(json.loads(line)["packed"]))
        # Ends this process even if its parent was killed and the interpreter is in a call of C code.
        faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, exit=True)
        try:
            output = score_once(scored_task, row, response, seconds)
            reply = {"score": output.score, "feedback": output.feedback, "unknown_keys": output.unknown_keys}
        except SDPOError as error:
            reply = {"refusal": str(error)}
        except RewardFailure as failure:
            reply = {"failure": str(failure), "kind": failure.kind}
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(reply), file=replies)
