"""Rows whose mappings have different keys, solutions that are not text, and reward functions that write to a row."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdpo.config.data import RewardConfig
from sdpo.errors import SDPOError
from sdpo.rewards.base import InvalidRewardError, RewardOutput, Row, parse_reward
from sdpo.rewards.manager import RewardManager
from sdpo.rewards.rows import drop_nulls, load_rows, read_solution
from sdpo.rewards.scoring_process import ScoringProcess


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


WEATHER = [
    {"role": "user", "content": "Weather in Paris?"},
    {"role": "assistant", "content": None, "tool_calls": [call("weather", city="Paris")]},
    {"role": "tool", "content": "sunny", "name": "weather"},
]
SUM = [
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [call("add", a=1, b=2)]},
]


def write(folder: Path, prompts: list[Any], **columns: Any) -> str:
    rows = [
        {
            "data_source": "x",
            "prompt": prompt,
            "reward_model": {"ground_truth": "1"},
            **{name: values[i] for name, values in columns.items()},
        }
        for i, prompt in enumerate(prompts)
    ]
    file = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    return str(file)


def test_keys_of_other_rows_are_left_out(tmp_path: Path) -> None:
    """Parquet unites the keys of all rows; the loaded messages are those that were written."""
    infos = [{"index": 1, "tests": [{"input": "a"}, {"output": "b"}]}, {"level": "hard"}]
    loaded = load_rows([write(tmp_path, [WEATHER, SUM], extra_info=infos)], "data.train_files")
    assert [row.prompt for row in loaded] == [WEATHER, SUM]
    assert [row.extra_info for row in loaded] == infos


def test_content_is_null_only_beside_tool_calls(tmp_path: Path) -> None:
    file = write(tmp_path, [[{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "name": "y"}]])
    with pytest.raises(SDPOError, match="row 0: a message of the prompt needs role and content"):
        load_rows([file], "data.train_files")


def test_items_of_lists_and_values_that_are_false_stay() -> None:
    value = {"a": None, "b": [None, {"c": None, "d": 0}], "e": "", "f": {"g": None}, "h": False}
    assert drop_nulls(value) == {"b": [None, {"d": 0}], "e": "", "f": {}, "h": False}
    assert drop_nulls({"role": "assistant", "content": None, "x": None}) == {"role": "assistant", "content": None}


def test_solution_is_text_from_any_field() -> None:
    row = {"reward_model": {"ground_truth": 3, "answers": ["3"]}, "extra_info": {"solution": "1 + 2 = 3", "m": {}}}
    assert read_solution(row, "reward_model.ground_truth", "row 1") == "3"
    assert read_solution(row, "extra_info.solution", "row 1") == "1 + 2 = 3"
    assert read_solution(row, "extra_info.none", "row 1") is None
    assert read_solution({"reward_model": {}, "extra_info": None}, "extra_info.solution", "row 1") is None
    for key, kind in (("reward_model.answers", "a list"), ("extra_info.m", "a mapping")):
        with pytest.raises(SDPOError, match=rf"^row 1: {key} is {kind} .*set data\.solution_key to a field with text"):
            read_solution(row, key, "row 1")


class Writing:
    def compute_score(self, row: Row, response: str) -> float:
        row.extra_info.setdefault("calls", []).append(response)  # type: ignore[attr-defined]
        row.prompt[0]["content"] = response
        return float(len(row.extra_info["calls"]))


def test_reward_function_that_writes_to_its_row_changes_nothing() -> None:
    row = Row("x", [{"role": "user", "content": "?"}], {"ground_truth": "1"}, extra_info={"tests": [1]})
    outputs = RewardManager(Writing(), RewardConfig()).compute_score([(row, "a"), (row, "b")])
    assert outputs == [RewardOutput(1.0), RewardOutput(1.0)]
    assert row == Row("x", [{"role": "user", "content": "?"}], {"ground_truth": "1"}, extra_info={"tests": [1]})


class Misspelt:
    def compute_score(self, row: Row, response: str) -> dict[str, Any]:
        return {"score": 1, "feeback": "wrong", "acc": 1}


def test_unknown_keys_of_an_answer_are_named_once(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.WARNING)
    manager = RewardManager(Misspelt(), RewardConfig())
    for _ in range(2):
        assert manager.compute_score([(Row("x", [], {}), "a"), (Row("x", [], {}), "b")]) == [RewardOutput(1.0)] * 2
    assert caplog.messages == [
        "data.task: the reward function returns 'feeback', which is ignored; did you mean feedback?",
        "data.task: the reward function returns 'acc', which is ignored; only score and feedback are read",
    ]
    (tmp_path / "reward.py").write_text("def compute_score(row, response):\n    return {'score': 1, 'feeback': ''}\n")
    process = ScoringProcess(str(tmp_path / "reward.py"), "{}", 30.0)
    assert process.compute_score(Row("x", [], {}), "a").unknown_keys == ("feeback",)
    process.close()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (1e39, r"between -1e\+30 and 1e\+30, got 1e\+39"),
        (-1e200, r"between -1e\+30 and 1e\+30, got -1e\+200"),
        ({"score": 1, "feedback": "bad \ud83d half"}, "half a surrogate pair"),
    ],
)
def test_score_and_feedback_that_cannot_be_used_are_a_failure(answer: Any, message: str) -> None:
    with pytest.raises(InvalidRewardError, match=message):
        parse_reward(answer)
    assert parse_reward({"score": -1e30, "feedback": "\U0001f600"}) == RewardOutput(-1e30, "\U0001f600")
