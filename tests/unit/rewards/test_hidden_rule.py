"""The offline task: its rules, rows, tokenizer and tiny model, and that making them is reproducible."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.errors import SDPOError
from sdpo.prompting.demonstrations import PrivilegedContext
from sdpo.prompting.tokenization import encode_prompt, encode_teacher_prompt
from sdpo.rewards.base import RewardOutput
from sdpo.rewards.rows import load_rows
from sdpo.rewards.toy.base import FEEDBACK_TEXT
from sdpo.rewards.toy.hidden_rule import MODES, HiddenRule, build_rules, build_tokenizer

SMALL: dict[str, Any] = {"pretrain_steps": 3, "num_train": 40, "num_test": 8}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "feedback"
    HiddenRule(str(folder), **SMALL).prepare()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def digits(row: Any) -> str:
    [message] = row.prompt
    assert message["role"] == "user"
    return str(message["content"])


# --- rules


@pytest.mark.parametrize("mode", MODES)
def test_rules_are_distinct_and_not_the_identity(mode: str) -> None:
    rules = build_rules(mode)
    length = MODES[mode].length
    assert len(rules) == MODES[mode].num_rules
    assert len({tuple(rule) for rule in rules}) == len(rules)
    assert all(sorted(rule) == list(range(length)) != rule for rule in rules)
    assert rules[0] == list(range(length))[::-1]
    assert rules == build_rules(mode)


# --- rows


@pytest.mark.parametrize("mode", MODES)
def test_rows_are_in_verl_s_schema(tmp_path: Path, mode: str) -> None:
    HiddenRule(str(tmp_path / "x"), mode=mode, **{**SMALL, "pretrain_steps": 0}).prepare()
    for split, num_rows in (("train", 40), ("test", 8)):
        records = pq.read_table(tmp_path / "x" / f"{split}.parquet").to_pylist()
        assert len(records) == num_rows
        for index, record in enumerate(records):
            assert list(record) == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
            [message] = record["prompt"]
            text = message["content"]
            assert message["role"] == "user" and len(text) == MODES[mode].length and text.isdigit()
            assert record["data_source"] == "hidden_rule"
            assert record["reward_model"] == {"style": "rule", "ground_truth": text[::-1]}
            assert record["extra_info"] == {"split": split, "index": index}


def test_prompts_are_unique_over_both_files(made: Path) -> None:
    rows = load_rows([str(made / "train.parquet"), str(made / "test.parquet")], "x")
    assert len({digits(row) for row in rows}) == 48


def test_only_exact_answers_score(made: Path) -> None:
    task, row = HiddenRule(str(made), **SMALL), load_rows([str(made / "test.parquet")], "x")[0]
    answer = digits(row)[::-1]
    assert task.compute_score(row, answer) == task.compute_score(row, f" {answer}\n") == RewardOutput(1.0, None)
    failed = RewardOutput(0.0, f"Expected: {answer}")
    for wrong in ("", digits(row), answer[:-1], answer + "0", answer[:4] + " " + answer[4:]):
        assert task.compute_score(row, wrong) == failed


# --- tokenizer


def test_tokenizer_decodes_its_tokens() -> None:
    tokenizer = build_tokenizer()
    for text in ("0123456789", "Expected: 4711", "Correctly solve the original question.\n", "Grüße, 数学\t!"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_and_template_words_are_single_tokens() -> None:
    tokenizer, defaults = build_tokenizer(), SelfDistillationConfig()
    assert [tokenizer.decode(t) for t in tokenizer("0123456789")["input_ids"]] == list("0123456789")
    text = defaults.feedback_template.format(feedback_raw=FEEDBACK_TEXT) + defaults.solution_template.format(
        successful_previous_attempt=""
    )
    text += defaults.reprompt_template.format(prompt="", solution="", feedback="")
    words = text.replace(".", " .").replace(":", " :").split()
    tokens = [tokenizer.decode(t).strip() for t in tokenizer(text)["input_ids"]]
    assert [token for token in tokens if token] == words


@pytest.mark.parametrize("mode", MODES)
def test_prompts_fit_the_window(made: Path, mode: str) -> None:
    tokenizer = build_tokenizer()
    text = "0" * MODES[mode].length
    messages = [{"role": "user", "content": text}]
    shown = PrivilegedContext(solution=text, feedback=FEEDBACK_TEXT + text)
    teacher = encode_teacher_prompt(tokenizer, messages, shown, SelfDistillationConfig())
    assert teacher.token_ids is not None
    window = AutoModelForCausalLM.from_pretrained(made / "model").config.max_position_embeddings
    assert len(teacher.token_ids) + MODES[mode].length + 1 <= window
    assert len(encode_prompt(tokenizer, messages)) <= 32, "data.max_prompt_length of the shipped runs"


def test_transformers_loads_model_and_tokenizer(made: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(made / "model")
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    assert len(tokenizer) == model.config.vocab_size == len(build_tokenizer())
    assert tokenizer.eos_token_id == model.config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id
    messages = [{"role": "user", "content": "12345678"}]
    expected = "<|im_start|>user\n12345678<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(encode_prompt(tokenizer, messages)) == expected


# --- making


def test_equal_arguments_give_equal_files(made: Path, tmp_path: Path) -> None:
    HiddenRule(str(tmp_path / "again"), **SMALL).prepare()
    assert contents(tmp_path / "again") == contents(made)
    assert {"train.parquet", "test.parquet", "model/model.safetensors", "model/config.json"} <= contents(made).keys()


def test_another_seed_gives_other_files(made: Path, tmp_path: Path) -> None:
    HiddenRule(str(tmp_path / "other"), seed=1, **SMALL).prepare()
    other, first = contents(tmp_path / "other"), contents(made)
    for name in ("train.parquet", "test.parquet", "model/model.safetensors"):
        assert other[name] != first[name]


def test_pretraining_does_not_change_the_global_generator(made: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    HiddenRule(str(tmp_path / "untrained"), **{**SMALL, "pretrain_steps": 0}).prepare()
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
    untrained, trained = contents(tmp_path / "untrained"), contents(made)
    assert untrained["train.parquet"] == trained["train.parquet"]
    assert untrained["model/model.safetensors"] != trained["model/model.safetensors"]


class Watching:
    """Counts the steps of pretraining, and stops it on request as Ctrl-C does."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.interrupt_at = interrupt_at
        self.seen: list[tuple[int, int]] = []

    def on_metrics(self, step: int, values: Any) -> None: ...

    def on_progress(self, description: str, done: int, total: int) -> None:
        self.seen.append((done, total))
        if done == self.interrupt_at:
            raise KeyboardInterrupt


def test_interruption_leaves_no_files(tmp_path: Path) -> None:
    task = HiddenRule(str(tmp_path / "x"), **SMALL)
    with pytest.raises(KeyboardInterrupt):
        task.prepare(Watching(interrupt_at=2))
    assert list(tmp_path.iterdir()) == []
    watching = Watching()
    task.prepare(watching)
    assert watching.seen == [(1, 3), (2, 3), (3, 3)]
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_existing_files_are_not_created_again(made: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in made.rglob("*")}
    watching = Watching()
    HiddenRule(str(made), **SMALL).prepare(watching)
    assert watching.seen == []
    assert {p: p.stat().st_mtime_ns for p in made.rglob("*")} == before


@pytest.mark.parametrize("change", [{"seed": 1}, {"mode": "peers"}, {"num_train": 41}, {"pretrain_steps": 4}])
def test_folder_with_other_arguments_is_refused(made: Path, change: dict[str, Any]) -> None:
    before = contents(made)
    with pytest.raises(SDPOError, match="was created with") as caught:
        HiddenRule(str(made), **{**SMALL, **change}).prepare()
    assert str(made) in str(caught.value)
    assert contents(made) == before


def test_folder_with_other_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SDPOError, match="exists without hidden-rule data"):
        HiddenRule(str(tmp_path), **SMALL).prepare()
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_folder_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SDPOError, match="cannot be created"):
        HiddenRule(str(tmp_path / "file" / "x"), **SMALL).prepare()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HOME", str(tmp_path))
    yield tmp_path


def test_tilde_is_the_home_folder(home: Path) -> None:
    HiddenRule("~/x", **{**SMALL, "pretrain_steps": 0}).prepare()
    assert json.loads((home / "x" / "recipe.json").read_text())["num_train"] == 40


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ({"mode": "peer"}, "mode='peer': must be one of feedback, peers"),
        ({"num_test": 0}, "num_test=0: must be an integer of at least 1"),
        ({"num_train": "many"}, "num_train='many': must be an integer of at least 1"),
        ({"seed": "x"}, "seed='x': must be an integer of at least 0"),
        ({"seed": 1.5}, "seed=1.5: must be an integer of at least 0"),
        ({"pretrain_steps": -1}, "pretrain_steps=-1: must be an integer of at least 0"),
        ({"mode": "peers", "num_train": 100_000}, "exceeds the 100000 prompts of mode peers"),
        ({"dir": 3}, "dir=3: must be the name of a folder"),
    ],
)
def test_invalid_arguments_are_refused(args: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SDPOError, match=r"data\.task_args") as caught:
        HiddenRule(**{"dir": "x", **args})
    assert complaint in str(caught.value)
