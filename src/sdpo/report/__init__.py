"""What a person looks at: the console while a run trains, learning curves and one page afterwards.

Everything is made from the run folder (``metrics.jsonl``, ``run.yaml``, ``rollouts/``), so both engines share it.
Drawing libraries are loaded on use: importing this package is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sdpo.errors import ConfigError
from sdpo.report.run_dir import RunRecord, read_run, read_runs

__all__ = ["ReportPaths", "RunRecord", "read_run", "read_runs", "write_report"]


class ReportPaths(NamedTuple):
    plot: Path
    page: Path


def write_report(output_dirs: Sequence[str | Path], out: str | Path | None = None) -> ReportPaths:
    """Write ``report.png`` and ``report.html``, all runs overlaid, into ``out`` or else the first run's folder.

    Raises:
        ConfigError: a folder is not a run's, its metrics cannot be read, or ``out`` cannot be written.
    """
    if not output_dirs:
        raise ConfigError("no run folder given; name at least one, e.g. sdpo report outputs/hidden_rule")
    records = read_runs(output_dirs)

    from sdpo.report.page import write_page
    from sdpo.report.plots import plot_learning_curves, render_learning_curves
    from sdpo.report.theme import DARK

    folder = Path(out) if out is not None else records[0].path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plot = plot_learning_curves(records, folder / "report.png")
        dark_plot = render_learning_curves(records, DARK)
        page = write_page(records, folder / "report.html", plot.read_bytes(), dark_plot)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot write the report there: {error.strerror or error}") from error
    return ReportPaths(plot, page)
