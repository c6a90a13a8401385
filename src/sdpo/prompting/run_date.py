"""The date that chat templates write, such as that of Llama 3.2: the date at which the run began.

With today's date, a run could not be resumed after midnight, and the teacher's prompts would differ from the student's.
An environment variable holds it, which the processes of a run inherit.
"""

from __future__ import annotations

import os
from datetime import datetime
from typing import Any

RUN_DATE = "SDPO_RUN_DATE"


def begin_run(date: str | None = None) -> str:
    """Set the run's date and return it.

    Args:
        date: in ISO format, of a run that is resumed; now, if it is missing or no date.
    """
    try:
        began = datetime.fromisoformat(date or "")
    except ValueError:
        began = datetime.now()
    os.environ[RUN_DATE] = began.isoformat(timespec="seconds")
    return os.environ[RUN_DATE]


def template_settings(chat_template: Any) -> dict[str, Any]:
    """Arguments of a chat template that writes the date; empty for others."""
    if "strftime_now" not in str(chat_template):
        return {}
    date = datetime.fromisoformat(os.environ[RUN_DATE]) if RUN_DATE in os.environ else datetime.now()
    return {"strftime_now": date.strftime}
