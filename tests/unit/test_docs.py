"""The documentation agrees with the code: links, generated pages, commands, config files."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdpo.config.loader import load_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

LINK = re.compile(r"\]\(([^)\s]+)\)")
CONFIG_FILE = re.compile(r"\bconfigs/[\w./-]+\.ya?ml\b")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)


def extract_code(text: str) -> str:
    """Code blocks of a page, without blocks of ``text``, which are drawings."""
    blocks = re.findall(r"^ *```([^\n]*)\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join(code for language, code in blocks if language != "text")


def list_commands(text: str) -> Iterator[list[str]]:
    """The ``sdpo ...`` lines of the code blocks, split into words without comments."""
    for line in extract_code(text.replace("\\\n", " ")).splitlines():
        words = shlex.split(line, comments=True)
        while words and (words[0] == "$" or re.fullmatch(r"[A-Z_]+=.*", words[0])):
            words.pop(0)
        if words and Path(words[0]).name == "sdpo":
            yield words[1:]


def find_broken_links(page: Path, text: str) -> list[str]:
    targets = [target.partition("#")[0] for target in LINK.findall(text) if not re.match(r"[a-z]+:", target)]
    return [target for target in targets if target and not (page.parent / target).exists()]


def find_unknown_command(words: list[str]) -> str | None:
    import typer

    from sdpo.cli import app

    command = typer.main.get_command(app)
    for word in words:
        if word.startswith("-") or not hasattr(command, "commands"):
            return None
        if word not in command.commands:
            return word
        command = command.commands[word]
    return None


def test_site_builds_without_warnings(tmp_path: Path) -> None:
    result = run("-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site"))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "site" / "configuration.html").is_file()


@pytest.mark.parametrize("text", ["[a](absent.md)", "[a](metrics.md#absent)"])
def test_broken_link_fails_the_build(tmp_path: Path, text: str) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Home\n\n{text}\n")
    (tmp_path / "docs" / "metrics.md").write_text("# Metrics\n")
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (tmp_path / "mkdocs.yml").write_text(re.sub(r"(?s)^nav:.*?(?=^\w)", "", config, flags=re.MULTILINE))
    result = run("-m", "mkdocs", "build", "--strict", "--config-file", str(tmp_path / "mkdocs.yml"))
    assert result.returncode != 0
    assert "absent" in result.stderr


def test_generated_pages_are_up_to_date() -> None:
    result = run("docs/generate.py", "--check")
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_setting_and_metric_is_documented() -> None:
    from sdpo.config.root import iterate_settings
    from sdpo.observability.metrics import DESCRIPTIONS

    configuration, metrics = ((ROOT / "docs" / name).read_text() for name in ("configuration.md", "metrics.md"))
    assert [key for key, _ in iterate_settings() if f"| `{key}` |" not in configuration] == []
    assert [name for name in DESCRIPTIONS if f"| `{name}` |" not in metrics] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_config_files_and_commands_of_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert find_broken_links(page, text) == []
    assert [name for name in CONFIG_FILE.findall(text) if not (ROOT / name).is_file()] == []
    for words in list_commands(text):
        assert find_unknown_command(words) is None, f"sdpo {shlex.join(words)}"
        if words[:1] == ["train"] and (ROOT / words[1]).is_file():
            load_config(ROOT / words[1], [word for word in words[2:] if "=" in word and not word.startswith("-")])


def test_broken_link_and_unknown_command_are_found() -> None:
    page = "[a](absent.md) [b](https://example.org) [c](#here) [d](README.md#part)\n\n"
    page += (
        "```bash\n$ OMP_NUM_THREADS=1 .venv/bin/sdpo train configs/a.yaml \\\n  seed=1  # twice\nls\n```\nsdpo prose\n"
    )
    assert find_broken_links(ROOT / "page.md", page) == ["absent.md"]
    assert list(list_commands(page)) == [["train", "configs/a.yaml", "seed=1"]]
    assert find_unknown_command(["trian", "configs/a.yaml"]) == "trian"
