"""Output of ``sdpo doctor``: versions, devices and backends."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sdpo.doctor import Devices, Report
from sdpo.report.dry_run import format_bytes

# Other packages are shown only if their version does not fit.
ALWAYS_SHOWN = {
    *("torch", "transformers", "omegaconf", "vllm"),
    *("verl", "ray", "tensordict", "hydra-core", "TransferQueue"),
}


def print_doctor_report(report: Report, console: Console | None = None) -> None:
    """Print versions, devices, warnings and the status of each backend."""
    console = console or Console()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    for heading in ("needed by", "package", "range", "installed", ""):
        table.add_column(heading, overflow="fold")
    last = ""
    for package in report.packages:
        if package.name in ALWAYS_SHOWN or not package.fits:
            fits = Text("ok", "green") if package.fits else Text("no", "red")
            backend = "" if package.backend == last else package.backend
            table.add_row(backend, package.name, package.needed or "any", package.version or "-", fits)
            last = package.backend
    console.print(Padding(table, (1, 0), expand=False))

    grid = Table.grid(padding=(0, 2, 0, 0))
    for name, value in _describe_devices(report.devices):
        grid.add_row(Text(name, "bold"), Text(value))
    console.print(Padding(grid, (0, 0, 1, 0), expand=False))

    # Lines instead of a table, so that commands can be copied.
    for warning in report.warnings:
        console.print(Text(f"warning: {warning}", "yellow"), soft_wrap=True)
    width = max(len(status.name) for status in report.backends)
    for status in report.backends:
        label = Text(f"{status.name:<{width}}  ", "bold")
        if status.problems:
            answer = Text.assemble(("no", "red"), f": {'; '.join(status.problems)}")
        else:
            answer = Text.assemble(("yes", "green"), f", {status.note}" if status.note else "")
        console.print(label + answer, soft_wrap=True)


def _describe_devices(devices: Devices) -> list[tuple[str, str]]:
    threads = f", {devices.num_torch_threads} of them torch's" if devices.num_torch_threads else ""
    cuda = "\n".join(f"{i}: {name}, {format_bytes(size)}" for i, (name, size) in enumerate(devices.cuda))
    mps = "yes" if devices.has_mps else "none"
    if devices.num_torch_threads is None:
        cuda = mps = "unknown without torch"
    elif not cuda:
        cuda = "none" if devices.torch_cuda else "none; torch is built without it"
    return [
        ("CPU", f"{devices.num_cores} cores{threads}"),
        ("memory", _format_size(devices.memory)),
        ("/dev/shm", f"{_format_size(devices.shared_memory_free)} free"),
        ("CUDA", cuda),
        ("MPS", mps),
    ]


def _format_size(size: int | None) -> str:
    return "unknown" if size is None else format_bytes(size)
