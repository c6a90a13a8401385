"""Headline numbers of runs, one row per run and data source, for the console and the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from sdpo.observability.metrics import RESPONSE_LENGTH_MEAN, TIME_EVAL, TIME_SAVE, TIME_STEP, teacher_val_name, val_name
from sdpo.report.run_dir import RunRecord

HEADINGS = {
    "steps": "Completed training steps, of all steps if the run is not complete.",
    "before": "Validation accuracy before training.",
    "final": "Validation accuracy of the last validation, with its step if later steps have none.",
    "best": "Highest validation accuracy.",
    "teacher": "Validation accuracy of the teacher, with the context that it has in training, of the last validation.",
    "length": "Mean response length of the last step, in tokens.",
    "s/step": "Median seconds per step.",
    "minutes": "Minutes of all steps, validations and checkpoints.",
}
ACCURACY_HEADINGS = ("before", "final", "best", "teacher")


@dataclass(frozen=True)
class Summary:
    """Numbers of a run on one validation data source; None for missing numbers."""

    run: RunRecord
    source: str | None
    steps: int
    before: float | None
    final: float | None
    final_step: int | None
    best: float | None
    teacher: float | None
    response_length: float | None
    seconds_per_step: float | None
    minutes: float | None

    def cells(self) -> tuple[str, ...]:
        """Format the numbers in the order of ``HEADINGS``."""
        final = format_number(self.final, ".3f")
        if self.final_step is not None and self.final_step < self.steps:
            final += f" (step {self.final_step})"
        return (
            self.run.stop or str(self.steps),
            format_number(self.before, ".3f"),
            final,
            *(format_number(value, ".3f") for value in (self.best, self.teacher)),
            format_number(self.response_length, ".1f"),
            format_number(self.seconds_per_step, ".2f"),
            format_number(self.minutes, ".1f"),
        )


def summarize(records: Sequence[RunRecord]) -> list[Summary]:
    """Summarize each run, once per data source."""
    return [summary for record in records for summary in _summaries(record)]


def format_number(value: float | None, spec: str) -> str:
    """Format a number; ``-`` for None."""
    return "-" if value is None else format(value, spec)


def _summaries(record: RunRecord) -> Iterator[Summary]:
    # A run without validation has a row too; no metric has an empty name.
    for source, statistic in (record.accuracies() or {"": ""}).items():
        student = val_name(source, statistic) if source else ""
        teacher = teacher_val_name(source, statistic) if source else ""
        yield Summary(
            run=record,
            source=source or None,
            steps=record.last_step,
            before=_before_training(record, student),
            final=record.final(student),
            final_step=next(reversed(record.series(student)[0]), None),
            best=record.best(student),
            teacher=record.final(teacher),
            response_length=record.final(RESPONSE_LENGTH_MEAN),
            # The median excludes the warm-up in the first step.
            seconds_per_step=median(times) if (times := record.series(TIME_STEP)[1]) else None,
            minutes=_minutes(record),
        )


def _before_training(record: RunRecord, metric: str) -> float | None:
    steps, values = record.series(metric)
    return values[0] if steps and steps[0] == 0 else None


def _minutes(record: RunRecord) -> float | None:
    seconds = [row[name] for row in record.rows for name in (TIME_STEP, TIME_EVAL, TIME_SAVE) if name in row]
    return sum(seconds) / 60 if seconds else None
