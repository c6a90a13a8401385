"""No file of the repository contains the words that the style page of CONTRIBUTING.md bans."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = [
    *("src", "tests", "docs", "benchmarks", "examples", "recipe", "configs"),
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "mkdocs.yml", "pyproject.toml"),
    *("requirements-vllm.txt", ".ci/run"),
]
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".sh", ".toml", ".txt", ""}
BANNED = [
    "so many",
    "hears?|heard",
    "tells|told",
    "spoilt",
    "anew",
    "nobody",
    "for want of",
    "a person",
    "unheeded",
    "of its own",
    "(go|goes|going|went|gone) on",
    "begun",
    "stands (for|in|beside|under|there|alone|as|at)",
    "shares? of",
    "held[- ]out",
    "image tower",
    "run files?",
    "embedded engine",
    "verl engine",
    "hand(ed|s|ing)?[- ]over",
    "trim(s|med|ming)?",
    "MOST_[A-Z]|DEEPEST_|LARGEST_",
]
# "N per X", not "N a X".
COUNTED = (
    "tokens|rollouts|prompts|samples|responses|rows|steps|updates|operations|launches|numbers|requests|times|GB|GiB|MB"
)
UNITS = "step|prompt|response|token|second|chunk|sample|batch|mini-batch|micro-batch|row|pass|sequence|GPU|node|run"
PATTERN = re.compile(rf"\b({'|'.join(BANNED)}|({COUNTED}) an? ({UNITS}))\b", re.IGNORECASE)
STYLE_PAGE = ("<!-- style -->", "<!-- /style -->")  # contains the words


def find_banned(text: str) -> list[str]:
    """Banned words of a text."""
    if STYLE_PAGE[0] in text:
        before, _, rest = text.partition(STYLE_PAGE[0])
        style, _, after = rest.partition(STYLE_PAGE[1])
        text = before + "\n" * style.count("\n") + after
    # A line break, a comment sign or the quotes of two strings may split a phrase.
    joined = re.sub(r"\s*[\"']?\n\s*(#|f?[\"'])?\s*", lambda gap: " " + "\0" * (len(gap[0]) - 1), text)
    joined = joined.replace("\0", "")
    return sorted({match[0] for match in PATTERN.finditer(joined)})


def list_files() -> list[Path]:
    paths = [
        path for place in PLACES for path in ([ROOT / place] if (ROOT / place).is_file() else (ROOT / place).rglob("*"))
    ]
    return sorted(
        path
        for path in paths
        if path.is_file() and path.suffix in SUFFIXES and "results" not in path.parts and path != Path(__file__)
    )


@pytest.mark.parametrize("path", list_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_banned_words(path: Path) -> None:
    assert find_banned(path.read_text(encoding="utf-8")) == []


def test_banned_words_are_found() -> None:
    assert find_banned("The actor tells the sampler.") == ["tells"]
    assert find_banned('raise SDPOError("drawn for want "\n    f"of memory")') == ["for want of"]
    assert find_banned("# 8 rollouts\n# a prompt") == ["rollouts a prompt"]
    assert find_banned("The cost per step; of its owner") == []
    assert find_banned(f"{STYLE_PAGE[0]} not: anew {STYLE_PAGE[1]} a whole") == []
