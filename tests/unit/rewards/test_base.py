"""Rows, tasks and scores: valid ones are read, and each error is one line."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdpo.errors import SDPOError
from sdpo.rewards.base import BUILT_IN, InvalidRewardError, RewardOutput, Row, load_task, parse_reward
from sdpo.rewards.rows import load_rows
from sdpo.rewards.toy.hidden_rule import HiddenRule

QUESTION = [{"role": "user", "content": "1 + 1?"}]
ROW = {"data_source": "sums", "prompt": QUESTION, "reward_model": {"style": "rule", "ground_truth": "2"}}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(records: list[dict[str, Any]], name: str = "rows.parquet", schema: pa.Schema | None = None) -> str:
        pq.write_table(pa.Table.from_pylist(records, schema=schema), tmp_path / name)
        return str(tmp_path / name)

    return write


def refusal(files: list[str]) -> str:
    with pytest.raises(SDPOError) as caught:
        load_rows(files, "data.train_files")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_read_rows_equal_the_written_rows(write: Any) -> None:
    full = {**ROW, "ability": "math", "extra_info": {"index": 7}}
    rows = load_rows([write([full, full]), write([ROW], "more.parquet")], "data.train_files")
    assert rows[0] == rows[1] == Row("sums", QUESTION, ROW["reward_model"], "math", {"index": 7})
    assert rows[2] == Row("sums", QUESTION, ROW["reward_model"])
    assert [row.ground_truth for row in rows] == ["2", "2", "2"]


@pytest.mark.parametrize(("stored", "expected"), [(2, "2"), (None, None), ("", "")])
def test_ground_truth_is_a_text_or_none(write: Any, stored: Any, expected: str | None) -> None:
    [row] = load_rows([write([{**ROW, "reward_model": {"style": "rule", "ground_truth": stored}}])], "x")
    assert row.ground_truth == expected


def test_empty_list_of_files() -> None:
    assert refusal([]) == "data.train_files is empty; name at least one parquet file"


def test_missing_file(tmp_path: Path) -> None:
    assert refusal([f"{tmp_path}/none.parquet"]) == f"data.train_files: {tmp_path}/none.parquet: no such file"


def test_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_text("PAR1 and then nothing of the kind")
    assert refusal([f"{tmp_path}/rows.parquet"]).startswith(
        f"data.train_files: {tmp_path}/rows.parquet: not a readable parquet file ("
    )


@pytest.mark.parametrize("column", ["data_source", "prompt", "reward_model"])
def test_missing_column(write: Any, column: str) -> None:
    file = write([{k: v for k, v in ROW.items() if k != column}])
    assert f"{file}: column '{column}' is missing; it has " in refusal([file])


def test_file_without_rows(write: Any) -> None:
    file = write([], schema=pa.Table.from_pylist([ROW]).schema)
    assert refusal([file]) == f"data.train_files: {file}: no rows"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"prompt": "1 + 1?"}, "prompt must be a list of messages"),
        ({"prompt": []}, "prompt must be a list of messages"),
        ({"prompt": ["1 + 1?"]}, "a message of the prompt needs role and content"),
        ({"prompt": [{"role": "user"}]}, "a message of the prompt needs role and content"),
        ({"prompt": [{"content": "1 + 1?"}]}, "a message of the prompt needs role and content"),
        ({"prompt": [{"role": "system", "content": "Add."}]}, "the prompt has no user message"),
        ({"reward_model": "2"}, "reward_model must have ground_truth in it"),
        ({"reward_model": None}, "reward_model must have ground_truth in it"),
    ],
)
def test_malformed_row(write: Any, change: dict[str, Any], complaint: str) -> None:
    message = refusal([write([ROW], "good.parquet"), file := write([{**ROW, **change}])])
    assert message.startswith(f"data.train_files: {file}: row 0: ")
    assert complaint in message


# --- tasks


def test_built_in_task(tmp_path: Path) -> None:
    task = load_task("hidden_rule", {"dir": str(tmp_path), "mode": "peers"})
    assert task == HiddenRule(str(tmp_path), "peers")


GRADERS = {
    "float": "def compute_score(row, response):\n    return 0.5 if response == row.ground_truth else 0",
    "mapping": "def compute_score(row, response):\n    return {'score': 0.5 * (response == '2'), 'feedback': 'almost'}",
    "output": "from sdpo.rewards.base import RewardOutput\ndef compute_score(row, response):\n"
    "    return RewardOutput(0.5 * (response == '2'), 'almost')",
    # A dataclass with postponed annotations looks its module up in sys.modules.
    "dataclass": "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    "@dataclass\nclass build_task:\n    value: float = 0.5\n"
    "    def compute_score(self, row, response):\n        return self.value * (response == '2')",
}


@pytest.mark.parametrize("kind", GRADERS)
def test_custom_task_as_a_file(tmp_path: Path, kind: str) -> None:
    (tmp_path / "json.py").write_text(GRADERS[kind])  # a name that a module of Python has, too
    task = load_task(f"{tmp_path}/json.py", {})
    row = Row(**ROW)
    feedback = "almost" if kind in ("mapping", "output") else None
    assert parse_reward(task.compute_score(row, "2")) == RewardOutput(0.5, feedback)
    assert parse_reward(task.compute_score(row, "3")) == RewardOutput(0.0, feedback)
    import json

    assert json.dumps([]) == "[]"


def test_custom_task_as_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_task_for_tests.py").write_text(GRADERS["float"])
    monkeypatch.syspath_prepend(tmp_path)
    assert parse_reward(load_task("own_task_for_tests", {}).compute_score(Row(**ROW), "2")).score == 0.5


def test_arguments_reach_the_task(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(GRADERS["dataclass"])
    assert parse_reward(load_task(f"{tmp_path}/task.py", {"value": 0.25}).compute_score(Row(**ROW), "2")).score == 0.25


@pytest.mark.parametrize(
    ("source", "args", "complaint"),
    [
        (None, {}, "no such file"),
        ("x = 1", {}, "defines neither compute_score"),
        (GRADERS["float"], {"value": 1}, r"takes no arguments; remove them \(data.task_args=\{\}\)"),
        (GRADERS["dataclass"], {"valeu": 1}, "unexpected keyword argument 'valeu'; it accepts value"),
        ("def compute_score(row, response)", {}, r"SyntaxError: expected ':' \(task.py, line 1\)"),
        ("x = 1\ny = 1 / 0\n", {}, r"ZeroDivisionError: division by zero, .*task\.py:2"),
        ("def build_task(*, size):\n    raise KeyError(size)", {"size": 3}, r"KeyError: 3, .*task\.py:2"),
    ],
)
def test_task_that_cannot_be_loaded(tmp_path: Path, source: str | None, args: Any, complaint: str) -> None:
    if source is not None:
        (tmp_path / "task.py").write_text(source)
    with pytest.raises(SDPOError, match=complaint) as caught:
        load_task(f"{tmp_path}/task.py", args)
    assert "task.py" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["hiden_rule", "no.such.task", "", ".task", "a b", "json.nothing", "folder/task"])
def test_unknown_task(name: str) -> None:
    with pytest.raises(SDPOError, match=rf"data\.task={re.escape(name)}: no such task; use {', '.join(BUILT_IN)}"):
        load_task(name, {})


def test_missing_library_of_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "task_that_needs_more.py").write_text("import a_library_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SDPOError, match=r"task_that_needs_more: cannot be imported .*'a_library_that_is_not_there'"):
        load_task("task_that_needs_more", {})


# --- scores


@pytest.mark.parametrize("value", [1, True, 1.0, "1", RewardOutput(1), {"score": 1}])
def test_scores_of_all_kinds_become_floats(value: Any) -> None:
    output = parse_reward(value)
    assert output == RewardOutput(1.0, None)
    assert type(output.score) is float


@pytest.mark.parametrize(
    "value",
    [None, math.nan, math.inf, "good", RewardOutput(math.nan), {"feedback": "no score"}, {"score": None}, [1, 2]],
)
def test_invalid_score_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRewardError, match=r"the score must be a finite number, got"):
        parse_reward(value)


def test_invalid_feedback_is_refused() -> None:
    with pytest.raises(InvalidRewardError, match=r"feedback must be text, got \['wrong'\]"):
        parse_reward({"score": 0, "feedback": ["wrong"]})
