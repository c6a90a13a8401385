"""Learning curves of one or several runs in one figure: validation accuracy on top, training metrics below."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from sdpo.observability import metrics
from sdpo.report.run_dir import RunRecord
from sdpo.report.theme import LIGHT, Theme

_DOTS_PER_INCH = 150
_SMALL_PANELS_PER_ROW = 3
_FEW_POINTS = 40

# Inches: figure, margins, and the space above a panel for its title and below it for its axis.
_WIDTH, _LEFT, _RIGHT, _BETWEEN, _ABOVE, _BELOW = 12.0, 0.6, 0.25, 0.6, 0.4, 0.5

_SOLID: dict[str, Any] = {"linewidth": 2, "solid_capstyle": "round"}
_DASHED: dict[str, Any] = {"linewidth": 1.4, "linestyle": (0, (4, 2))}
_DOTTED: dict[str, Any] = {"linewidth": 1.2, "linestyle": (0, (1, 2)), "zorder": 1}
_FAINT: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.3}


@dataclass(frozen=True)
class Panel:
    """A small plot: a metric of the student and, dashed, of the teacher."""

    title: str
    student: str
    teacher: str | None = None
    unit_range: bool = False
    is_accuracy: bool = False
    smooth: bool = True

    def has_data(self, records: Sequence[RunRecord]) -> bool:
        return any(math.isfinite(value) for record in records for value in record.series(self.student)[1])


PanelRow = tuple[float, list[Panel]]  # height of the plots in inches, the panels side by side

_TRAINING_PANELS = (
    Panel("Training score", metrics.SCORE_MEAN, unit_range=True),
    Panel("Divergence, nats per token", metrics.DIVERGENCE),
    Panel("Response length, tokens", metrics.RESPONSE_LENGTH_MEAN),
    Panel("Entropy, nats", metrics.ENTROPY, teacher=metrics.TEACHER_ENTROPY),
    Panel("Log-prob, teacher - student", metrics.LOGPROB_DIFF_MEAN),
    Panel("Gradient norm", metrics.GRAD_NORM),
)


def plot_learning_curves(records: Sequence[RunRecord], path: str | Path, theme: Theme = LIGHT) -> Path:
    """Write the learning curves as a PNG."""
    path = Path(path)
    path.write_bytes(render_learning_curves(records, theme))
    return path


def render_learning_curves(records: Sequence[RunRecord], theme: Theme = LIGHT) -> bytes:
    """Render the learning curves as the bytes of a PNG."""
    buffer = BytesIO()
    build_figure(records, theme).savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
    return buffer.getvalue()


def build_figure(records: Sequence[RunRecord], theme: Theme = LIGHT) -> Figure:
    """Build a figure with a panel per metric that at least one run has."""
    accuracy = _accuracy_panels(records)
    training = [panel for panel in _TRAINING_PANELS if panel.has_data(records)]
    return _draw(
        records, [(3.0, row) for row in _in_rows(accuracy)] + [(1.8, row) for row in _in_rows(training)], theme
    )


def _draw(records: Sequence[RunRecord], rows: Sequence[PanelRow], theme: Theme) -> Figure:
    accuracy = [panel for _, row in rows for panel in row if panel.is_accuracy]
    # Without pyplot, so that the caller's figures and backend do not change.
    figure = Figure(facecolor=theme.background)
    FigureCanvasAgg(figure)
    legend = _legend_entries(records, rows, theme)
    columns = _count_columns([str(entry.get_label()) for entry in legend])
    for axes, panel in _lay_out(figure, rows, legend_height=0.15 + 0.25 * math.ceil(len(legend) / columns)):
        _draw_panel(axes, panel, records, theme)
        if len(accuracy) == 1 and panel.is_accuracy:
            _label_ends(axes, panel, records, theme)
    _add_legend(figure, legend, columns, theme)
    return figure


def plot_panels(records: Sequence[RunRecord], panels: Sequence[Panel], path: str | Path, theme: Theme = LIGHT) -> None:
    """Write small plots of given metrics as a PNG, in the style of the learning curves."""
    figure = _draw(records, [(1.8, row) for row in _in_rows(list(panels))], theme)
    figure.savefig(path, format="png", dpi=_DOTS_PER_INCH)


def _accuracy_panels(records: Sequence[RunRecord]) -> list[Panel]:
    accuracies = sorted({accuracy for record in records for accuracy in record.accuracies().items()})
    several_sources = len({source for source, _ in accuracies}) > 1
    panels = [
        Panel(
            "Validation accuracy" + f", {source}" * several_sources + f", {statistic}" * (statistic != "mean@1"),
            metrics.val_name(source, statistic),
            metrics.teacher_val_name(source, statistic),
            unit_range=True,
            is_accuracy=True,
        )
        for source, statistic in accuracies
    ]
    return [panel for panel in panels if panel.has_data(records)]


def _lay_out(figure: Figure, rows: Sequence[PanelRow], legend_height: float) -> list[tuple[Axes, Panel]]:
    """Create axes for the panels, row by row, with aligned left edges."""
    height = legend_height + sum(row_height + _ABOVE + _BELOW for row_height, _ in rows)
    figure.set_size_inches(_WIDTH, height)
    placed = []
    bottom = height - legend_height
    for row_height, panels in rows:
        bottom -= _ABOVE + row_height
        columns = len(panels) if panels[0].is_accuracy else _SMALL_PANELS_PER_ROW
        width = (_WIDTH - _LEFT - _RIGHT - (columns - 1) * _BETWEEN) / columns
        for column, panel in enumerate(panels):
            left = _LEFT + column * (width + _BETWEEN)
            box = (left / _WIDTH, bottom / height, width / _WIDTH, row_height / height)
            placed.append((figure.add_axes(box), panel))
        bottom -= _BELOW
    return placed


def _coloured(records: Sequence[RunRecord], theme: Theme) -> Iterator[tuple[RunRecord, str]]:
    return zip(records, theme.run_colours(len(records)), strict=True)


def _in_rows(panels: list[Panel]) -> list[list[Panel]]:
    return [panels[i : i + _SMALL_PANELS_PER_ROW] for i in range(0, len(panels), _SMALL_PANELS_PER_ROW)]


def _draw_panel(axes: Axes, panel: Panel, records: Sequence[RunRecord], theme: Theme) -> None:
    for record, colour in _coloured(records, theme):
        for metric, style in ((panel.teacher, _DASHED), (panel.student, _SOLID)):
            if metric and record.series(metric)[0]:
                _draw_curve(axes, record, metric, smooth=panel.smooth and not panel.is_accuracy, color=colour, **style)
        for event in record.health_events:
            axes.axvline(event["step"], color=colour, **_DOTTED)
    axes.set_xlim(0, max(record.last_step for record in records) or 1)
    _style_axes(axes, panel, theme)


def _draw_curve(axes: Axes, record: RunRecord, metric: str, *, smooth: bool, **style: Any) -> None:
    """Draw few points as they are, many points as a faint line with a bold running mean."""
    steps, values = record.series(metric)
    finite = [value if math.isfinite(value) else math.nan for value in values]
    name = f"{record.name}|{metric}"
    if smooth and len(steps) > _FEW_POINTS:
        axes.plot(steps, finite, gid=name, color=style["color"], **_FAINT)
        axes.plot(steps, _running_mean(finite), gid=f"{name}|mean", **style)
    else:
        marker = "o" if len(steps) <= _FEW_POINTS else None
        axes.plot(steps, finite, gid=name, marker=marker, markersize=2 * style["linewidth"], clip_on=False, **style)


def _running_mean(values: Sequence[float]) -> NDArray[Any]:
    """Compute a centred running mean over a twentieth of the points."""
    kernel = np.ones(max(3, len(values) // 20) | 1)
    numbers = np.asarray(values, dtype=float)
    known = np.isfinite(numbers)
    count = np.convolve(known, kernel, mode="same")
    total = np.convolve(np.where(known, numbers, 0.0), kernel, mode="same")
    mean: NDArray[Any] = np.divide(total, count, out=np.full_like(numbers, np.nan), where=count > 0)
    return mean


def _style_axes(axes: Axes, panel: Panel, theme: Theme) -> None:
    axes.set_facecolor(theme.background)
    axes.set_title(_plain(panel.title), loc="left", fontsize=11, fontweight="bold", color=theme.ink)
    axes.set_xlabel("step", fontsize=9, color=theme.muted)
    axes.tick_params(length=0, labelsize=9, labelcolor=theme.muted)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.line)
    axes.grid(axis="y", color=theme.line, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    low, high = axes.dataLim.intervaly
    if panel.unit_range and low >= 0 and high <= 1:
        axes.set_ylim(-0.03, 1.03)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    elif low >= 0:
        axes.set_ylim(bottom=0)
    else:
        axes.axhline(0, color=theme.muted, linewidth=0.8, zorder=1)


def _label_ends(axes: Axes, panel: Panel, records: Sequence[RunRecord], theme: Theme) -> None:
    """Write name and last value of each run next to the end of its line, without overlaps."""
    ends = []
    for record, colour in _coloured(records, theme):
        steps, values = record.series(panel.student)
        if values and math.isfinite(values[-1]):
            stop = f", stopped at {record.stop}" if record.stop else ""
            ends.append((values[-1], steps[-1], f"{_shorten(record.name)}  {values[-1]:.2f}{stop}", colour))
    low, high = axes.get_ylim()
    heights = _spread([end[0] for end in ends], gap=(high - low) * 0.075, ceiling=high)
    right = axes.get_xlim()[1]
    ticks = [tick for tick in axes.get_xticks() if tick <= right]
    for (_, step, text, colour), height in zip(ends, heights, strict=True):
        place: dict[str, Any] = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(_plain(text), (step, height), color=colour, fontsize=10, fontweight="bold", **place)
    # The labels are inside the panel, so that it is as wide as the rows below.
    axes.set_xlim(0, right * (1.02 + 0.0085 * max((len(end[2]) for end in ends), default=0)))
    axes.set_xticks(ticks)


def _spread(heights: Sequence[float], gap: float, ceiling: float) -> list[float]:
    """Move heights to a distance of at least ``gap``, below ``ceiling``."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = list(heights)
    for below, above in pairwise(order):
        moved[above] = max(moved[above], moved[below] + gap)
    for i in reversed(order):
        moved[i] = min(moved[i], ceiling)
        ceiling = moved[i] - gap
    return moved


def _legend_entries(records: Sequence[RunRecord], rows: Sequence[PanelRow], theme: Theme) -> list[Line2D]:
    entries = [
        Line2D([], [], color=colour, linewidth=2.5, label=_plain(_shorten(record.name)))
        for record, colour in _coloured(records, theme)
    ]
    shown = [(record, panel) for record in records for _, panels in rows for panel in panels]
    if any(panel.teacher and record.series(panel.teacher)[0] for record, panel in shown):
        entries.append(Line2D([], [], color=theme.muted, **_DASHED, label="teacher"))
    if any(record.health_events for record in records):
        entries.append(Line2D([], [], color=theme.muted, **_DOTTED, label="failed health check"))
    if any(
        panel.smooth and not panel.is_accuracy and len(record.series(panel.student)[0]) > _FEW_POINTS
        for record, panel in shown
    ):
        entries.append(Line2D([], [], color=theme.muted, **_FAINT, label="each step (bold: running mean)"))
    return entries


def _add_legend(figure: Figure, entries: Sequence[Line2D], columns: int, theme: Theme) -> None:
    figure.legend(
        handles=entries,
        loc="upper left",
        bbox_to_anchor=(_LEFT / _WIDTH, 1 - 0.1 / figure.get_figheight()),
        borderaxespad=0,
        borderpad=0,
        ncols=columns,
        frameon=False,
        fontsize=11,
        labelcolor=theme.ink,
    )


def _count_columns(labels: Sequence[str]) -> int:
    """Number of legend entries per row: all if they fit, else columns of equal width."""
    widths = [0.75 + 0.1 * len(label) for label in labels]
    return len(labels) if sum(widths) < _WIDTH - _LEFT else max(1, int((_WIDTH - _LEFT) / max(widths)))


def _shorten(name: str, length: int = 28) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _plain(text: str) -> str:
    # Escape names for matplotlib: $ begins a formula, and a leading underscore hides a legend entry.
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")
