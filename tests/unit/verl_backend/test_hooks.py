"""Every hook into verl has its recorded fingerprint."""

from __future__ import annotations

import json
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

from sdpo.verl_backend.compat.hooks import HOOKS, VERL_VERSION, fingerprint

RECORDED = Path(__file__).parents[2] / "golden" / "verl_hooks.json"
CHANGED = (
    "{where} of verl {found} differs from verl {written}: read the change, fix the code that depends on it "
    "(docs/verl_hooks.md), then write the new fingerprint {now} into {file}"
)


@pytest.mark.parametrize("where", [hook.where for hook in HOOKS])
def test_hook_has_its_recorded_fingerprint(where: str) -> None:
    recorded = json.loads(RECORDED.read_text())
    now = fingerprint(where)
    assert now == recorded[where], CHANGED.format(
        where=where, found=version("verl"), written=VERL_VERSION, now=now, file=RECORDED.name
    )


def test_fingerprint_detects_another_or_a_missing_function() -> None:
    first, second = "verl.utils.config:validate_config", "verl.utils.config:omega_conf_to_dataclass"
    assert fingerprint(first) != fingerprint(second)
    with pytest.raises(AttributeError):
        fingerprint("verl.utils.config:no_such_function")


def test_fingerprints_are_recorded_for_exactly_the_hooks() -> None:
    assert json.loads(RECORDED.read_text()).keys() == {hook.where for hook in HOOKS}


def test_plugin_is_an_entry_point_of_verl() -> None:
    assert {"sdpo": "sdpo.verl_backend.compat.plugin"}.items() <= {
        entry.name: entry.value for entry in entry_points(group="verl.plugins")
    }.items()
