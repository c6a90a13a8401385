"""What ``sdpo train --dry-run`` shows: the resolved run and what it would cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from sdpo.config import Run, format_run

if TYPE_CHECKING:
    from sdpo.embedded.cost import Cost


def print_dry_run(run: Run, cost: Cost, console: Console | None = None) -> None:
    """Print the run as YAML, then an upper bound of tokens and memory."""
    console = console or Console()
    console.print(format_run(run), markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"tokens a step: at most {cost.tokens_a_step:,} in {run.data.train_batch_size * run.sampler.n:,} rollouts; "
        f"{run.total_steps:,} steps"
    )
    if cost.num_params is None:
        console.print(f"memory: unknown until {run.model.path} is made, on first use", soft_wrap=True)
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(f"memory ({cost.num_params:,} parameters)")
    table.add_column("at most", justify="right")
    for role, items in (("learner", cost.learner), ("sampler", cost.sampler)):
        for name, size in items.items():
            if size:
                table.add_row(f"{role}: {name}", format_bytes(size))
        table.add_row(f"{role}, together", format_bytes(sum(items.values())), style="bold", end_section=True)
    console.print(table)


def format_bytes(size: float) -> str:
    """In binary units: 1536 is ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1024
    return f"{size:,.1f} GiB"
