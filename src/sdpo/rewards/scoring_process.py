"""A grader in a process of its own, where a call that takes too long can be ended from any thread.

An alarm (``grading.py``) interrupts Python's main thread only, and no single call of C code, as a regular expression
may be: those are ended with the process.
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

# Seconds beyond the timeout: the alarm comes first, since it says where; then the process ends itself; then we end it.
GRACE_SECONDS = 2.0


class ScoringProcess:
    """Grades by a task that runs in another process; safe in every thread, one response at a time.

    Args:
        task: name, module or file.
        args: of the task, as JSON.
        timeout: seconds that one response may take.
    """

    def __init__(self, task: str, args: str, timeout: float) -> None:
        self._timeout = timeout
        self._worker = WorkerProcess("sdpo.rewards.scoring_process:_serve", [task, args, str(timeout)])

    def compute_score(self, row: Row, response: str) -> RewardOutput:
        """Grade one response.

        Raises:
            RewardFailure: see ``score_once``; or the process died.
            DataError: the task cannot be loaded, or refuses its data.
        """
        packed = base64.b64encode(pickle.dumps((row, response))).decode()
        try:
            reply = self._worker.ask({"packed": packed}, self._timeout + 2 * GRACE_SECONDS)
        except WorkerTimeout:
            reason = f"{describe_timeout(self._timeout)}, or its process died"
            raise RewardFailure(f"{name_row(row)}: {reason}", WorkerTimeout.__name__) from None
        if "refusal" in reply:
            raise DataError(reply["refusal"])
        if "failure" in reply:
            raise RewardFailure(reply["failure"], reply["kind"])
        return RewardOutput(reply["score"], reply["feedback"])

    def close(self) -> None:
        """End the process; the next response starts another."""
        self._worker.close()


def _serve(task: str, args: str, timeout: str) -> None:
    replies = take_output()
    seconds = float(timeout)
    refusal = ""
    try:
        reward_manager = load_task(task, json.loads(args))
    except SDPOError as error:
        refusal = str(error)
    print("ready", file=replies)
    for line in sys.stdin:
        if refusal:
            print(json.dumps({"refusal": refusal}), file=replies)
            continue
        row, response = pickle.loads(base64.b64decode(json.loads(line)["packed"]))
        # Ends this process whatever runs, also where nobody would any more since the parent was killed.
        faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, exit=True)
        try:
            grade = score_once(reward_manager, row, response, seconds)
            reply = {"score": grade.score, "feedback": grade.feedback}
        except SDPOError as error:
            reply = {"refusal": str(error)}
        except RewardFailure as failure:
            reply = {"failure": str(failure), "kind": failure.kind}
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(reply), file=replies)
