"""What ``sdpo train --dry-run`` shows: the resolved run and what it would cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from sdpo.config.loader import to_yaml
from sdpo.config.root import SDPOConfig

if TYPE_CHECKING:
    from sdpo.models.memory_estimate import MemoryEstimate


def print_dry_run(run: SDPOConfig, cost: MemoryEstimate, console: Console | None = None) -> None:
    """Print the run as YAML, then an upper bound of tokens and memory."""
    console = console or Console()
    console.print(to_yaml(run), markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"tokens a step: at most {cost.tokens_a_step:,} in {run.data.train_batch_size * run.rollout.n:,} rollouts; "
        f"{run.max_steps:,} steps"
    )
    if cost.num_params is None:
        console.print(f"memory: unknown until {run.model.path} is made, on first use", soft_wrap=True)
        return
    console.print(build_memory_table(cost))


def build_memory_table(cost: MemoryEstimate) -> Table:
    """Memory by what needs it, on one GPU of each role; the phases of the actor's come after each other."""
    params = f"{cost.num_params:,} parameters"
    if cost.num_tower_params:
        params += f", {cost.num_tower_params:,} of them for images"
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(f"memory ({params})")
    table.add_column("at most", justify="right")
    for name, size in list_memory(cost):
        total = name.endswith("at once")
        table.add_row(name, format_bytes(size), style="bold" if total else None, end_section=total)
    return table


def list_memory(cost: MemoryEstimate) -> list[tuple[str, int]]:
    """The table's rows: what needs memory, and bytes."""
    rows = [(f"actor: {name}", size) for name, size in cost.actor.items()]
    rows += [(f"actor, learning: {name}", size) for name, size in cost.learning.items()]
    for phase, items in cost.phases.items():
        rows += [(f"actor, {phase}: {name}", size) for name, size in items.items()]
    sampler = [(f"sampler: {name}", size) for name, size in cost.sampler.items()]
    if cost.colocated:
        rows += [*sampler, (f"actor and sampler{_each(cost.num_learners)}, at once", cost.learner_peak)]
    else:
        rows.append((f"actor{_each(cost.num_learners)}, at once", cost.learner_peak))
        rows += [*sampler, (f"sampler{_each(cost.num_samplers)}, at once", cost.sampler_peak)]
    return [(name, size) for name, size in rows if size]


def _each(num_gpus: int) -> str:
    return f" on each of {num_gpus} GPUs" if num_gpus > 1 else ""


def format_bytes(size: float) -> str:
    """In binary units: 1536 is ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1024
    return f"{size:,.1f} GiB"
