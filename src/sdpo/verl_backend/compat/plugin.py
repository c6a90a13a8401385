"""Entry point of the group ``verl.plugins``: what must be known in every process before verl looks for a device.

verl loads it on ``import verl``, and only logs (at DEBUG) when that fails; ``main.py`` checks that it has happened.
Engine, trainers and workers need no registration ahead: ``main.py`` hands verl the classes themselves.
"""

from __future__ import annotations

import os

import sdpo.verl_backend.cpu.platform  # noqa: F401

if os.environ.get("VERL_PLATFORM") == "cpu":
    from sdpo.verl_backend.cpu.processor import stand_in

    stand_in()
