"""Console output of a run: a progress bar during training and a table at the end.

If the output is not a terminal, the same numbers are printed as lines: one per validation and per tenth of the run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from sdpo.observability.metrics import (
    DIVERGENCE,
    RESPONSE_LENGTH_MEAN,
    SCORE_MEAN,
    find_accuracies,
    teacher_val_name,
    val_name,
)
from sdpo.report.run_dir import RunRecord
from sdpo.report.summary import HEADINGS, summarize


class ConsoleCallback:
    """Prints log records, progress and metrics of a run; a context manager that restores the terminal at exit."""

    def __init__(self, max_steps: int, console: Console | None = None) -> None:
        self._console = console or Console()
        self._max_steps = max_steps
        self._clock = _Clock(max_steps)
        self._preparation_tenths = _Tenths()
        self._run_tenths = _Tenths()
        # With FORCE_COLOR, rich treats a file as a terminal; a progress bar is useless in a file.
        is_terminal = self._console.is_interactive and self._console.file.isatty()
        self._bars = _Bars(self._console, max_steps) if is_terminal else None
        self._log_handler = _LogHandler(self._print_line)

    def __enter__(self) -> ConsoleCallback:
        if self._bars:
            self._bars.start()
        self._log_handler.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self._log_handler.detach()
        if self._bars:
            self._bars.stop()

    def _print_line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def on_progress(self, description: str, done: int, total: int) -> None:
        if self._bars:
            self._bars.show_preparation(description, done, total)
        elif self._preparation_tenths.is_new(done, total):
            self._print_line(f"{description}  {done}/{total}")

    def on_metrics(self, step: int, values: Mapping[str, float]) -> None:
        left = self._clock.time_left(step)
        accuracies = list(_describe_accuracies(values))
        if self._bars:
            self._bars.show_step(step, values, left)
            if accuracies:
                self._print_step(step, accuracies)
        elif self._run_tenths.is_new(step, self._max_steps) or accuracies:
            self._print_step(step, [*_describe_training(values), *accuracies, left])

    def _print_step(self, step: int, parts: Iterable[str]) -> None:
        width = len(str(self._max_steps))
        self._print_line("  ".join(filter(None, [f"step {step:>{width}}/{self._max_steps}", *parts])))


class _LogHandler(logging.Handler):
    """Prints the package's log records, from INFO on, each as a line."""

    def __init__(self, print_line: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._print = print_line
        self._logger = logging.getLogger("sdpo")
        self._level_before = self._logger.level

    def attach(self) -> None:
        self._level_before = self._logger.level
        self._logger.setLevel(logging.INFO)
        self._logger.addHandler(self)

    def detach(self) -> None:
        self._logger.removeHandler(self)
        self._logger.setLevel(self._level_before)

    def emit(self, record: logging.LogRecord) -> None:
        self._print(self.format(record))


def print_result_table(records: Sequence[RunRecord], console: Console | None = None) -> None:
    """Print one row per run and, if there are several, data source."""
    summaries = summarize(records)
    several_sources = len({summary.source for summary in summaries}) > 1
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    table.add_column("run", overflow="fold", min_width=8)
    if several_sources:
        table.add_column("data", overflow="fold", min_width=8)
    for heading in HEADINGS:
        # The common heading of the accuracies is above the first two columns.
        above = {"before": "validation\n", "final": "accuracy\n"}.get(heading, "")
        table.add_column(above + heading, justify="right", no_wrap=True)
    for summary in summaries:
        source = [Text(summary.source or "-")] if several_sources else []
        table.add_row(Text(summary.run.name), *source, *summary.cells())
    if console is None:
        console = Console()
        # Long lines, which a narrow terminal wraps, instead of truncated columns.
        console.width = max(console.width, 100 if several_sources or not console.is_terminal else 80)
    console.print(Padding(table, (1, 0), expand=False))


def _describe_training(values: Mapping[str, float]) -> Iterator[str]:
    for name, metric, spec in (
        ("score", SCORE_MEAN, ".3f"),
        ("divergence", DIVERGENCE, ".3f"),
        ("length", RESPONSE_LENGTH_MEAN, ".1f"),
    ):
        if metric in values:
            yield f"{name} {values[metric]:{spec}}"


def _describe_accuracies(values: Mapping[str, float]) -> Iterator[str]:
    accuracies = find_accuracies(values)
    for source, statistic in accuracies.items():
        label = f"val {source}" if len(accuracies) > 1 else "val"
        yield f"{label} {values[val_name(source, statistic)]:.3f}"
        if (teacher := teacher_val_name(source, statistic)) in values:
            yield f"teacher {values[teacher]:.3f}"


class _Tenths:
    """Selects the first report and one per tenth of the total."""

    def __init__(self) -> None:
        self._last: int | None = None

    def is_new(self, done: int, total: int) -> bool:
        tenth = 10 * done // max(total, 1)
        is_new = tenth != self._last
        self._last = tenth if done < total else None
        return is_new


class _Clock:
    """Estimates the remaining time from the steps since the start or the resumption of a run."""

    def __init__(self, max_steps: int) -> None:
        self._max_steps = max_steps
        self._first: tuple[int, float] | None = None

    def time_left(self, step: int) -> str:
        now = time.monotonic()
        self._first = self._first or (step, now)
        first_step, began = self._first
        if not first_step < step < self._max_steps:
            return ""
        seconds = round((now - began) / (step - first_step) * (self._max_steps - step))
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"


class _Bars:
    """A progress bar of the run with its latest numbers below, and a second bar during preparation."""

    def __init__(self, console: Console, max_steps: int) -> None:
        self._progress = _ProgressWithNumbers(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[left]}", style="dim"),
            console=console,
            expand=True,
            refresh_per_second=4,
        )
        self._max_steps = max_steps
        self._preparation: TaskID | None = None
        self._run: TaskID | None = None
        self._latest: dict[str, float] = {}

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def show_preparation(self, description: str, done: int, total: int) -> None:
        if self._preparation is None:
            self._preparation = self._progress.add_task(description, left="")
        self._progress.update(self._preparation, description=description, completed=done, total=total)
        if done >= total:
            self._progress.remove_task(self._preparation)
            self._preparation = None

    def show_step(self, step: int, values: Mapping[str, float], left: str) -> None:
        if self._run is None:
            self._run = self._progress.add_task("step", total=self._max_steps, left="")
        self._latest.update(values)
        numbers = [*_describe_training(self._latest), *_describe_accuracies(self._latest)]
        self._progress.numbers = Text("  ".join(numbers), style="dim")
        self._progress.update(self._run, completed=step, left=left)


class _ProgressWithNumbers(Progress):
    numbers: RenderableType = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        if self.numbers:
            yield self.numbers
