"""Print the output of ``--dry-run``: the resolved config, and bounds on tokens and memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from sdpo.config.loader import to_yaml
from sdpo.config.root import SDPOConfig

if TYPE_CHECKING:
    from sdpo.models.memory_estimate import MemoryEstimate


def print_dry_run(config: SDPOConfig, estimate: MemoryEstimate, console: Console | None = None) -> None:
    """Print the config as YAML, then upper bounds of tokens and memory."""
    console = console or Console()
    console.print(to_yaml(config), markup=False, highlight=False, soft_wrap=True)
    num_rollouts = config.data.train_batch_size * config.rollout.n
    console.print(
        f"tokens per step: at most {estimate.tokens_per_step:,} in {num_rollouts:,} rollouts; "
        f"{config.max_steps:,} steps"
    )
    if estimate.num_params is None:
        console.print(f"memory: unknown until {config.model.path} is made, on first use", soft_wrap=True)
        return
    console.print(build_memory_table(estimate))


def build_memory_table(estimate: MemoryEstimate) -> Table:
    """Memory by purpose, for one GPU of each role; phases of the actor do not overlap."""
    params = f"{estimate.num_params:,} parameters"
    if estimate.num_vision_params:
        params += f", {estimate.num_vision_params:,} of them for images"
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(f"memory ({params})")
    table.add_column("at most", justify="right")
    for name, size in list_memory(estimate):
        is_peak = name.endswith(", peak")
        table.add_row(name, format_bytes(size), style="bold" if is_peak else None, end_section=is_peak)
    return table


def list_memory(estimate: MemoryEstimate) -> list[tuple[str, int]]:
    """The table's rows: purpose and bytes."""
    rows = [(f"actor: {name}", size) for name, size in estimate.persistent.items()]
    rows += [(f"actor, training: {name}", size) for name, size in estimate.training.items()]
    for phase, items in estimate.phases.items():
        rows += [(f"actor, {phase}: {name}", size) for name, size in items.items()]
    sampler = [(f"sampler: {name}", size) for name, size in estimate.sampler.items()]
    on_actor_gpus, on_sampler_gpus = _on_each(estimate.num_actor_gpus), _on_each(estimate.num_sampler_gpus)
    if estimate.colocated:
        rows += [*sampler, (f"actor and sampler{on_actor_gpus}, peak", estimate.actor_peak)]
    else:
        rows.append((f"actor{on_actor_gpus}, peak", estimate.actor_peak))
        rows += [*sampler, (f"sampler{on_sampler_gpus}, peak", estimate.sampler_peak)]
    return [(name, size) for name, size in rows if size]


def _on_each(num_gpus: int) -> str:
    return f" on each of {num_gpus} GPUs" if num_gpus > 1 else ""


def format_bytes(size: float) -> str:
    """Format in binary units: 1536 is ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1024
    return f"{size:,.1f} GiB"
