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

from sdpo.errors import UserError
from sdpo.rewards.base import Grade, Row, load_task
from sdpo.rewards.scoring import GradingFailed, describe_timeout, grade_once, name_row
from sdpo.rewards.worker_process import CutOff, WorkerProcess, take_output

# Seconds beyond the timeout: the alarm comes first, since it says where; then the process ends itself; then we end it.
PATIENCE = 2.0


class GraderProcess:
    """Grades by a task that runs in another process; safe in every thread, one response at a time.

    Args:
        task: name, module or file.
        args: of the task, as JSON.
        timeout: seconds that one response may take.
    """

    def __init__(self, task: str, args: str, timeout: float) -> None:
        self._timeout = timeout
        self._worker = WorkerProcess("sdpo.rewards.scoring_process:_serve", [task, args, str(timeout)])

    def grade(self, row: Row, response: str) -> Grade:
        """Grade one response.

        Raises:
            GradingFailed: see ``grade_once``; or the process died.
            UserError: the task cannot be loaded, or refuses its data.
        """
        packed = base64.b64encode(pickle.dumps((row, response))).decode()
        try:
            reply = self._worker.ask({"packed": packed}, self._timeout + 2 * PATIENCE)
        except CutOff:
            reason = f"{describe_timeout(self._timeout)}, or its process died"
            raise GradingFailed(f"{name_row(row)}: {reason}", CutOff.__name__) from None
        if "refusal" in reply:
            raise UserError(reply["refusal"])
        if "failure" in reply:
            raise GradingFailed(reply["failure"], reply["kind"])
        return Grade(reply["score"], reply["feedback"])

    def close(self) -> None:
        """End the process; the next response starts another."""
        self._worker.close()


def _serve(task: str, args: str, timeout: str) -> None:
    replies = take_output()
    seconds = float(timeout)
    refusal = ""
    try:
        grader = load_task(task, json.loads(args))
    except UserError as error:
        refusal = str(error)
    print("ready", file=replies)
    for line in sys.stdin:
        if refusal:
            print(json.dumps({"refusal": refusal}), file=replies)
            continue
        row, response = pickle.loads(base64.b64decode(json.loads(line)["packed"]))
        # Ends this process whatever runs, also where nobody would any more since the parent was killed.
        faulthandler.dump_traceback_later(seconds + PATIENCE, exit=True)
        try:
            grade = grade_once(grader, row, response, seconds)
            reply = {"score": grade.score, "feedback": grade.feedback}
        except UserError as error:
            reply = {"refusal": str(error)}
        except GradingFailed as failure:
            reply = {"failure": str(failure), "kind": failure.kind}
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(reply), file=replies)
