"""Write the pages that are made from the code: ``python docs/generate.py``; ``--check`` exits 1 where one is stale."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from omegaconf import MISSING

from sdpo import metrics
from sdpo.config import describe_range, iterate_settings
from sdpo.verl_backend.hooks import HOOKS, VERL_VERSION

DOCS = Path(__file__).parent

CONFIGURATION = """\
# Configuration

A run is one YAML file; `key=value` on the command line overrides it, with the dotted keys below. An unknown key, a
wrong type and a value out of range are errors that say so. `null` stands for "not set".
"""

METRICS = """\
# Metrics

Every step appends one line to `metrics.jsonl` in the run folder. Names follow verl where verl has the quantity; what
is SDPO's own stands under `self_distillation/`.
"""


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def type_of(field: dataclasses.Field[object]) -> str:
    name, optional, _ = str(field.type).partition(" | None")
    return f"`{name}`" + (" or null" if optional else "")


def default_of(field: dataclasses.Field[object]) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return "mandatory" if value == MISSING else f"`{json.dumps(value)}`"


def configuration() -> str:
    page = CONFIGURATION
    settings = [(key.rpartition(".")[0], key, field) for key, field in iterate_settings()]
    for section, members in groupby(settings, key=lambda setting: setting[0]):
        rows = (
            (
                f"`{key}`",
                type_of(field),
                default_of(field),
                describe_range(field.metadata),
                field.metadata["help"],
            )
            for _, key, field in members
        )
        page += f"\n## {section or 'Top level'}\n\n" + table(("Key", "Type", "Default", "Range", "Meaning"), rows)
    return page


def metric_names() -> str:
    page = METRICS
    for family, members in groupby(metrics.DESCRIPTIONS.items(), key=lambda item: item[0].split("/")[0]):
        rows = ((f"`{name}`", meaning) for name, meaning in members)
        page += f"\n## {family}\n\n" + table(("Name", "Meaning"), rows)
    statistics = {
        "mean@1": "Held-out accuracy of the {who}, one greedy response a prompt.",
        "mean@N": "Mean accuracy over `eval.n` = N sampled responses a prompt; only if N > 0.",
        "best@N": "Share of prompts that one of them solves (pass@N).",
    }
    for family, who, name in (
        ("val-core", "student", metrics.val_name),
        ("val-teacher", "teacher, prompted as in training", metrics.teacher_val_name),
    ):
        rows = ((f"`{name('DATA_SOURCE', key)}`", text.format(who=who)) for key, text in statistics.items())
        page += f"\n## {family}\n\n" + table(("Name", "Meaning"), rows)
    return page


HOOKS_PAGE = """\
# Hooks into verl

Everything of verl {version} that is not a public interface and that `src/sdpo/verl_backend` stands on. The extra
`sdpo[verl]` installs this version and no other. `tests/unit/verl_backend/test_hooks.py` compares the source of each
with what it was when ours was written, and names the one that changed.

"""


def verl_hooks() -> str:
    rows = ((f"`{hook.where.replace(':', '` `')}`", hook.how, hook.why) for hook in HOOKS)
    return HOOKS_PAGE.format(version=VERL_VERSION) + table(("Where", "How", "Why"), rows)


PAGES = {"configuration.md": configuration, "metrics.md": metric_names, "verl_hooks.md": verl_hooks}


def main(arguments: list[str]) -> int:
    stale = [DOCS / name for name, build in PAGES.items() if _read(DOCS / name) != build()]
    if "--check" in arguments:
        for path in stale:
            print(f"{path} is stale; run python docs/generate.py")
        return bool(stale)
    for path in stale:
        path.write_text(PAGES[path.name](), encoding="utf-8")
    return 0


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
