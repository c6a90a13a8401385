"""The import layers of the package: all imports point down, also inside functions."""

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

BASE = {"c_compiler", "config", "errors", "file_lock", "observability", "retention"}
BELOW_TRAINERS = BASE | {"algorithm", "kernels", "prompting", "models", "rewards"}
TRAINERS = {"trainer", "verl_backend"}
ALL_LAYERS = BELOW_TRAINERS | TRAINERS | {"doctor", "report", "cli"}

MAY_IMPORT = {
    **dict.fromkeys(BASE, BASE),
    "algorithm": {"config"},
    "kernels": BASE | {"algorithm"},
    "prompting": BASE,
    "models": BASE | {"algorithm", "kernels", "prompting"},
    "rewards": BASE | {"prompting"},
    **dict.fromkeys(TRAINERS, BELOW_TRAINERS),
    "doctor": BASE,
    "report": BELOW_TRAINERS | TRAINERS | {"doctor"},
    "cli": ALL_LAYERS,
    "__init__": ALL_LAYERS,
}

ENGINE_LIBRARIES = {"torch", "transformers", "ray", "verl", "vllm"}
DEPENDENCIES_OF_TRANSFORMERS = {"huggingface_hub", "safetensors", "tokenizers"}  # part of the interface of transformers
DEPENDENCIES_OF_TORCH = {"triton"}  # torch's CUDA build depends on it
DEPENDENCIES_OF_OMEGACONF = {"yaml"}  # omegaconf depends on it
MODULE_NAMES = {"pillow": "PIL", "math-verify": "math_verify"}


class Import(NamedTuple):
    layer: str
    where: str
    module: str


def list_imports(source: str, layer: str, where: str, package: str) -> Iterator[Import]:
    for node in ast.walk(ast.parse(source)):
        location = f"{where}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            yield from (Import(layer, location, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            # `from sdpo import config` has the layer in its second part.
            names = [f"sdpo.{alias.name}" for alias in node.names] if module == "sdpo" else [module]
            yield from (Import(layer, location, name) for name in names)


def list_all_imports() -> list[Import]:
    found: list[Import] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        layer = relative.with_suffix("").parts[0]
        package = ".".join(["sdpo", *relative.parts[:-1]])
        found += list_imports(path.read_text(encoding="utf-8"), layer, str(relative), package)
    return found


def find_layer(module: str) -> str | None:
    root, _, rest = module.partition(".")
    if root != "sdpo":
        return None
    name = rest.split(".")[0]
    return name if name in MAY_IMPORT else "__init__"


def find_upward_imports(imports: list[Import]) -> list[str]:
    return [
        f"{where} imports {module}"
        for layer, where, module in imports
        if (target := find_layer(module)) and target != layer and target not in MAY_IMPORT[layer]
    ]


def libraries(imports: list[Import]) -> list[tuple[Import, str]]:
    roots = [(found, found.module.split(".")[0]) for found in imports]
    return [(found, root) for found, root in roots if root != "sdpo" and root not in sys.stdlib_module_names]


IMPORTS = list_all_imports()


def test_every_module_has_a_layer() -> None:
    layers = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert layers <= MAY_IMPORT.keys(), "add the new module to MAY_IMPORT"


def test_imports_point_down() -> None:
    assert find_upward_imports(IMPORTS) == []


@pytest.mark.parametrize(
    ("layer", "source"),
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
def test_upward_import_is_found(layer: str, source: str) -> None:
    assert find_upward_imports(list(list_imports(source, layer, "a.py", f"sdpo.{layer}")))


def test_base_layers_import_no_engine_library() -> None:
    layers = BASE | {"prompting", "report", "__init__"}
    assert [found for found, root in libraries(IMPORTS) if found.layer in layers and root in ENGINE_LIBRARIES] == []


def test_algorithm_imports_only_torch_and_jaxtyping() -> None:
    allowed = {"torch", "jaxtyping"}  # jaxtyping declares shapes in annotations; it imports at most numpy
    assert [found for found, root in libraries(IMPORTS) if found.layer == "algorithm" and root not in allowed] == []


def test_algorithm_loads_only_torch_and_the_settings_of_the_loss() -> None:
    modules = [
        f"sdpo.algorithm.{path.stem}" for path in (PACKAGE / "algorithm").glob("*.py") if path.stem != "__init__"
    ]
    assert modules
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    loaded = set(result.stdout.split())
    assert "torch" in loaded, result.stderr
    sdpo_modules = {name for name in loaded if name.split(".")[0] == "sdpo"}
    settings = {"sdpo", "sdpo.errors", "sdpo.config", "sdpo.config.field", "sdpo.config.self_distillation"}
    assert sdpo_modules - settings == {"sdpo.algorithm", *modules}
    assert loaded & {"omegaconf", "yaml", "transformers", "beartype"} == set()


def test_package_imports_only_declared_dependencies() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    project = tomllib.loads((PACKAGE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    # Extras of trackers have the names of their packages; geo3k and lora list packages that single files import.
    extras = project["optional-dependencies"]
    dependencies = [*project["dependencies"], *extras["geo3k"], *extras["lora"]]
    names = {re.split(r"[^\w-]", dependency)[0] for dependency in dependencies}
    installed = {MODULE_NAMES.get(name, name) for name in names}
    installed |= DEPENDENCIES_OF_TRANSFORMERS | DEPENDENCIES_OF_TORCH | DEPENDENCIES_OF_OMEGACONF | set(extras)
    assert [
        found for found, root in libraries(IMPORTS) if found.layer != "verl_backend" and root not in installed
    ] == []


@pytest.mark.parametrize("module", ["sdpo", "sdpo.config", "sdpo.cli"])
def test_command_line_starts_without_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({ENGINE_LIBRARIES!r} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
