"""The floors of the package: an import only ever points down, wherever in a file it stands."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "sdpo"

GROUND = {"config", "errors", "file_lock", "observability", "retention"}
BELOW_TRAINERS = GROUND | {"algorithm", "kernels", "prompting", "models", "rewards"}
TRAINERS = {"trainer", "verl_backend"}
EVERYTHING = BELOW_TRAINERS | TRAINERS | {"doctor", "report", "cli"}

MAY_IMPORT = {
    **dict.fromkeys(GROUND, GROUND),
    "algorithm": {"config"},
    "kernels": GROUND | {"algorithm"},
    "prompting": GROUND,
    "models": GROUND | {"algorithm", "kernels", "prompting"},
    "rewards": GROUND | {"prompting"},
    **dict.fromkeys(TRAINERS, BELOW_TRAINERS),
    "doctor": GROUND,
    "report": BELOW_TRAINERS | TRAINERS | {"doctor"},
    "cli": EVERYTHING,
    "__init__": EVERYTHING,
}

ENGINE_LIBRARIES = {"torch", "transformers", "ray", "verl", "vllm"}
OF_TRANSFORMERS = {"huggingface_hub", "safetensors", "tokenizers"}  # they are part of its interface
OF_TORCH = {"triton"}  # its CUDA build brings it
OF_OMEGACONF = {"yaml"}  # what it reads run files with
NAMED_OTHERWISE = {"pillow": "PIL", "math-verify": "math_verify"}


class Import(NamedTuple):
    floor: str
    where: str
    module: str


def imports_of(source: str, floor: str, where: str, package: str) -> Iterator[Import]:
    for node in ast.walk(ast.parse(source)):
        place = f"{where}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            yield from (Import(floor, place, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            # `from sdpo import config` names a floor only in its second half.
            names = [f"sdpo.{alias.name}" for alias in node.names] if module == "sdpo" else [module]
            yield from (Import(floor, place, name) for name in names)


def all_imports() -> list[Import]:
    found: list[Import] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        floor = relative.with_suffix("").parts[0]
        package = ".".join(["sdpo", *relative.parts[:-1]])
        found += imports_of(path.read_text(encoding="utf-8"), floor, str(relative), package)
    return found


def target_floor(module: str) -> str | None:
    root, _, rest = module.partition(".")
    if root != "sdpo":
        return None
    name = rest.split(".")[0]
    return name if name in MAY_IMPORT else "__init__"


def upward(imports: list[Import]) -> list[str]:
    return [
        f"{where} imports {module}"
        for floor, where, module in imports
        if (target := target_floor(module)) and target != floor and target not in MAY_IMPORT[floor]
    ]


def libraries(imports: list[Import]) -> list[tuple[Import, str]]:
    roots = [(found, found.module.split(".")[0]) for found in imports]
    return [(found, root) for found, root in roots if root != "sdpo" and root not in sys.stdlib_module_names]


IMPORTS = all_imports()


def test_every_file_has_its_floor() -> None:
    floors = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert floors <= MAY_IMPORT.keys(), "say in MAY_IMPORT where the new folder stands"


def test_imports_point_down() -> None:
    assert upward(IMPORTS) == []


@pytest.mark.parametrize(
    ("floor", "source"),
    [
        ("config", "import sdpo.algorithm.loss"),
        ("algorithm", "from sdpo.kernels.dispatch import fused_linear_sdpo_loss"),
        ("algorithm", "from sdpo.prompting.tokenization import encode_prompt"),
        ("prompting", "from sdpo import algorithm"),
        ("prompting", "from ..rewards.toy import hidden_rule"),
        ("rewards", "def f():\n    from sdpo.trainer.trainer import SDPOTrainer"),
        ("rewards", "from sdpo import SDPOTrainer"),
        ("trainer", "import sdpo.verl_backend"),
        ("verl_backend", "if True:\n    from ..trainer.trainer import train"),
        ("trainer", "from sdpo.report import write_report"),
        ("report", "from sdpo.cli import app"),
    ],
)
def test_an_import_that_points_up_is_found(floor: str, source: str) -> None:
    assert upward(list(imports_of(source, floor, "a.py", f"sdpo.{floor}")))


def test_the_ground_and_prompting_import_no_engine_library() -> None:
    quiet = GROUND | {"prompting", "report", "__init__"}
    assert [found for found, root in libraries(IMPORTS) if found.floor in quiet and root in ENGINE_LIBRARIES] == []


def test_the_algorithm_imports_torch_alone() -> None:
    assert [found for found, root in libraries(IMPORTS) if found.floor == "algorithm" and root != "torch"] == []


def test_the_algorithm_loads_torch_and_the_settings_of_the_loss_alone() -> None:
    modules = [
        f"sdpo.algorithm.{path.stem}" for path in (PACKAGE / "algorithm").glob("*.py") if path.stem != "__init__"
    ]
    assert modules
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    loaded = set(result.stdout.split())
    assert "torch" in loaded, result.stderr
    of_sdpo = {name for name in loaded if name.split(".")[0] == "sdpo"}
    settings = {"sdpo", "sdpo.errors", "sdpo.config", "sdpo.config.field", "sdpo.config.self_distillation"}
    assert of_sdpo - settings == {"sdpo.algorithm", *modules}
    assert loaded & {"omegaconf", "yaml", "transformers"} == set()


def test_the_core_imports_only_what_its_installation_brings() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    project = tomllib.loads((PACKAGE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    # Of the extras, trackers are named like what they bring; the data set's and LoRA's bring what a file or two import.
    extras = project["optional-dependencies"]
    everything = [*project["dependencies"], *extras["geo3k"], *extras["lora"]]
    names = {re.split(r"[^\w-]", dependency)[0] for dependency in everything}
    brought = {NAMED_OTHERWISE.get(name, name) for name in names}
    brought |= OF_TRANSFORMERS | OF_TORCH | OF_OMEGACONF | set(extras)
    assert [found for found, root in libraries(IMPORTS) if found.floor != "verl_backend" and root not in brought] == []


@pytest.mark.parametrize("module", ["sdpo", "sdpo.config", "sdpo.cli"])
def test_the_command_line_starts_without_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({ENGINE_LIBRARIES!r} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
