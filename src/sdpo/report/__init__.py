"""Console output during training, and learning curves and an HTML page afterwards.

Everything is read from the output folder (``metrics.jsonl``, ``run.yaml``, ``rollouts/``), so that both backends share
it. Plotting libraries are imported on use.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sdpo.errors import ConfigError
from sdpo.report.run_dir import RunRecord, read_run, read_runs

__all__ = ["ReportPaths", "RunRecord", "read_run", "read_runs", "write_report"]


class ReportPaths(NamedTuple):
    """Files of a report."""

    plot: Path
    page: Path


def write_report(output_dirs: Sequence[str | Path], out: str | Path | None = None) -> ReportPaths:
    """Write ``report.png`` and ``report.html`` of one or several runs; ``out`` defaults to the first run's folder.

    Raises:
        ConfigError: a folder is not an output folder, its metrics cannot be read, or ``out`` cannot be written.
    """
    if not output_dirs:
        raise ConfigError("no run folder given; name at least one, e.g. sdpo report runs/hidden_rule")
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
        raise ConfigError(
            f"{folder}: cannot write the report: {error.strerror or error}; name another folder by --out"
        ) from error
    return ReportPaths(plot, page)
