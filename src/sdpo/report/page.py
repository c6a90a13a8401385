"""A self-contained HTML page about one or several runs, without scripts."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from sdpo.config.root import iterate_settings
from sdpo.observability.metrics import DESCRIPTIONS
from sdpo.report.run_dir import RunRecord
from sdpo.report.summary import ACCURACY_HEADINGS, HEADINGS, Summary, summarize
from sdpo.report.theme import DARK, LIGHT, Theme

_MAX_ROLLOUT_CHARACTERS = 100_000
_NAMING_SETTINGS = ("output_dir", "tracking.name")
_NOT_IN_HTML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def write_page(records: Sequence[RunRecord], path: str | Path, plot: bytes, dark_plot: bytes | None = None) -> Path:
    """Write the page; ``plot`` and ``dark_plot`` are PNGs of the learning curves on a light and a dark background."""
    path = Path(path)
    path.write_text(build_page(records, plot, dark_plot), encoding="utf-8", errors="replace")
    return path


def build_page(records: Sequence[RunRecord], plot: bytes, dark_plot: bytes | None = None) -> str:
    """Build the HTML of the page."""
    summaries = summarize(records)
    title = _text(", ".join(record.name for record in records))
    body = [
        f"<header><p>SDPO run report</p><h1>{title}</h1></header>",
        _headline_table(summaries, records),
        _curves(summaries, plot, dark_plot),
        _differences(records),
        *(_run_section(index, record) for index, record in enumerate(records)),
    ]
    return _PAGE.format(title=title, style=_STYLE + _theme_style(len(records)), body="\n".join(filter(None, body)))


def differing_settings(records: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Settings with different values, each with its value in every run; names of runs are skipped."""
    keys = dict.fromkeys(key for record in records for key in record.settings if key not in _NAMING_SETTINGS)
    values = {key: [record.settings.get(key) for record in records] for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}


def _headline_table(summaries: Sequence[Summary], records: Sequence[RunRecord]) -> str:
    indices = {id(record): index for index, record in enumerate(records)}
    several_sources = len({summary.source for summary in summaries}) > 1
    before_accuracy = list(HEADINGS).index(ACCURACY_HEADINGS[0]) + 1 + several_sources
    headings = [f'<th scope="col" title="{_text(meaning)}">{_text(name)}</th>' for name, meaning in HEADINGS.items()]
    source_heading = '<th scope="col" class="text">data</th>' if several_sources else ""
    rows = []
    for summary in summaries:
        source = f'<td class="text">{_text(summary.source or "-")}</td>' if several_sources else ""
        cells = "".join(f"<td>{cell}</td>" for cell in summary.cells())
        name = _run_name(indices[id(summary.run)], summary.run)
        rows.append(f'<tr><th scope="row">{name}</th>{source}{cells}</tr>')
    return (
        '<div class="scroll"><table class="numbers"><thead>'
        f'<tr><td colspan="{before_accuracy}"></td>'
        f'<th scope="colgroup" class="group" colspan="{len(ACCURACY_HEADINGS)}"><span>validation accuracy</span></th>'
        f'<td colspan="{len(HEADINGS) - len(ACCURACY_HEADINGS) - 1}"></td></tr>'
        f'<tr><th scope="col">run</th>{source_heading}{"".join(headings)}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _curves(summaries: Sequence[Summary], plot: bytes, dark_plot: bytes | None) -> str:
    accuracies = [f"{s.run.name} ends at {s.final:.3f}" for s in summaries if s.final is not None]
    description = _text("Learning curves. Validation accuracy: " + (", ".join(accuracies) or "none") + ".")
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{_data_uri(dark_plot)}">' if dark_plot else ""
    return f'<div class="scroll"><picture>{dark}<img src="{_data_uri(plot)}" alt="{description}"></picture></div>'


def _differences(records: Sequence[RunRecord]) -> str:
    if len(records) < 2:
        return ""
    heading = "<section><h2>Different settings</h2>"
    differences = differing_settings(records)
    if not differences:
        return f"{heading}<p>None.</p></section>"
    names = "".join(f'<th scope="col">{_run_name(index, record)}</th>' for index, record in enumerate(records))
    rows = "".join(
        f'<tr><th scope="row">{_code(key)}</th>{"".join(f"<td>{_code(_show(value))}</td>" for value in values)}</tr>'
        for key, values in differences.items()
    )
    return (
        f'{heading}<div class="scroll"><table><thead><tr><th scope="col">setting</th>{names}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _run_section(index: int, record: RunRecord) -> str:
    last_row = record.rows[-1]
    stop = f" Stopped at step {record.stop}." if record.stop else ""
    parts = [
        f"<section><h2>{_run_name(index, record)}</h2><p>{_code(str(record.path))}{stop}</p>",
        _details(
            f"Metrics of the last step, {record.last_step}",
            _definitions((name, f"{value:.6g}", DESCRIPTIONS.get(name, "")) for name, value in last_row.items()),
        ),
    ]
    if record.health_events:
        events = [
            (f"step {event['step']}, {event.get('rule')}", str(event.get("action")), str(event.get("reason")))
            for event in record.health_events
        ]
        parts.append(_details(f"Failed health checks, {len(events)}", _definitions(events)))
    if record.settings:
        help_of = {key: field.metadata["help"] for key, field in iterate_settings()}
        settings = _definitions((key, _show(value), help_of.get(key, "")) for key, value in record.settings.items())
        parts.append(_details("All settings", settings))
    if rollouts := _last_rollouts(record.path):
        parts.append(_details(f"Sampled rollouts, {rollouts.name}", f"<pre>{_text(_read_start(rollouts))}</pre>"))
    return "".join(parts) + "</section>"


def _last_rollouts(run_folder: Path) -> Path | None:
    def step(path: Path) -> tuple[list[int], str]:
        return [int(digits) for digits in re.findall(r"\d+", path.stem)], path.name

    return max((run_folder / "rollouts").glob("*.txt"), key=step, default=None)


def _read_start(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        text = file.read(_MAX_ROLLOUT_CHARACTERS)
        return text + f"\n[... the rest is in {path.name}]" if file.read(1) else text


def _definitions(rows: Iterable[tuple[str, str, str]]) -> str:
    cells = "".join(
        f'<tr><th scope="row">{_code(name)}</th><td>{_code(value)}</td><td>{_text(meaning)}</td></tr>'
        for name, value, meaning in rows
    )
    return f'<div class="scroll"><table><tbody>{cells}</tbody></table></div>'


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{_text(summary)}</summary>{content}</details>"


def _run_name(index: int, record: RunRecord) -> str:
    return f'<span class="swatch run-{index}"></span>{_text(record.name)}'


def _code(text: str) -> str:
    return f"<code>{_text(text)}</code>"


def _text(text: str) -> str:
    return escape(_NOT_IN_HTML.sub("\N{REPLACEMENT CHARACTER}", text))


def _show(value: Any) -> str:
    """Format a setting as in a config file."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _theme_style(num_runs: int) -> str:
    swatches = "".join(f".run-{i} {{ background: var(--run-{i}); }}\n" for i in range(num_runs))
    dark = f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK, num_runs)} }} }}\n"
    return f":root {{ {_variables(LIGHT, num_runs)} }}\n{dark}{swatches}"


def _variables(theme: Theme, num_runs: int) -> str:
    colours = {
        "background": theme.background,
        "ink": theme.ink,
        "muted": theme.muted,
        "line": theme.line,
        **{f"run-{i}": colour for i, colour in enumerate(theme.run_colours(num_runs))},
    }
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


_STYLE = """
:root { color-scheme: light dark; }
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1240px; padding: 2.5rem 20px 4rem;
  background: var(--background); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
header p { margin: 0; color: var(--muted); font-size: 0.875rem; }
h1 { margin: 0 0 1.5rem; font-size: 1.75rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 0.5rem; font-size: 1.2rem; overflow-wrap: anywhere; }
section > p { margin: 0.25rem 0 0.75rem; color: var(--muted); }
img { display: block; width: 100%; min-width: 45rem; height: auto; margin: 2rem 0 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9375rem; }
th, td {
  padding: 0.35rem 1.5rem 0.35rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
}
th { font-weight: 600; }
thead th { color: var(--muted); font-weight: 500; white-space: nowrap; }
.numbers { width: 100%; font-variant-numeric: tabular-nums; }
.numbers th, .numbers td { padding: 0.5rem 0 0.5rem 1.25rem; text-align: right; white-space: nowrap; }
.numbers th:first-child, .numbers td:first-child { padding-left: 0; text-align: left; }
.numbers .text { text-align: left; }
.numbers thead tr:first-child > * { padding-bottom: 0; border-bottom: 0; }
.numbers .group span { display: block; border-bottom: 1px solid var(--line); text-align: center; }
.swatch { display: inline-block; width: 0.8em; height: 0.8em; margin-right: 0.5em; border-radius: 0.2em; }
details { border-bottom: 1px solid var(--line); }
summary { padding: 0.6rem 0; cursor: pointer; }
details > div, details > pre { margin: 0 0 1.25rem; }
details td:last-child { min-width: 22rem; color: var(--muted); }
code, pre { font: 0.875rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { white-space: pre-wrap; overflow-wrap: anywhere; }
th code { white-space: nowrap; }
td code { overflow-wrap: break-word; }
pre {
  max-height: 36rem; overflow: auto; padding: 1rem; border: 1px solid var(--line); border-radius: 0.4rem;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
