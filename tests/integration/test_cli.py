"""The command line: commands, user errors, errors of tasks, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

from sdpo import cli, doctor
from sdpo.config.loader import load_config
from sdpo.observability.metrics import STEP
from sdpo.rewards.toy import hidden_rule
from sdpo.rewards.toy.hidden_rule import HiddenRule

WriteConfigFile = Callable[[], Path]
COMMAND = [sys.executable, "-m", "sdpo.cli"]


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def sdpo(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Call the entry point in this process; an interpreter per call would take minutes."""

    def call(*arguments: object) -> Outcome:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["sdpo", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return Outcome(code, *capfd.readouterr())

    return call


def read_rows(output_dir: Path) -> list[dict[str, float]]:
    file = output_dir / "metrics.jsonl"
    # The last line may be incomplete.
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.is_file() else []


# --- commands --------------------------------------------------------------------------------------------------------


def test_help_lists_the_commands(sdpo: Callable[..., Outcome]) -> None:
    outcome = sdpo("--help")
    assert outcome.code == 0
    for command in ("train", "data", "export", "report", "doctor"):
        assert f"\n  {command} " in outcome.out
    assert "--dry-run" in sdpo("train", "--help").out
    assert "hidden-rule" in sdpo("data", "--help").out


def test_dry_run_prints_the_config_and_writes_no_files(
    sdpo: Callable[..., Outcome], write_config_file: WriteConfigFile, tmp_path: Path
) -> None:
    file = write_config_file()
    outcome = sdpo("train", file, "optim.lr=0.25", "--dry-run")
    assert outcome.code == 0 and outcome.err == ""
    resolved, tokens, memory = outcome.out.partition("tokens per step: at most ")
    (tmp_path / "resolved.yaml").write_text(resolved)
    assert load_config(tmp_path / "resolved.yaml") == load_config(file, ["optim.lr=0.25"])
    assert memory.startswith(f"{4 * 2 * (2048 + 8):,} in 8 rollouts; 2 steps")
    assert "actor and sampler, peak" in tokens + memory
    assert sorted(p.name for p in tmp_path.iterdir()) == ["resolved.yaml", "run.yaml"]


def test_dry_run_does_not_prepare_the_task(
    sdpo: Callable[..., Outcome], write_config_file: WriteConfigFile, tmp_path: Path
) -> None:
    outcome = sdpo("train", write_config_file(), f"data.task_args.dir={tmp_path}/later", "--dry-run")
    assert outcome.code == 0
    assert "memory: unknown until" in outcome.out
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


def test_dry_run_on_verl_prints_memory_per_gpu(
    sdpo: Callable[..., Outcome], write_config_file: WriteConfigFile, tmp_path: Path
) -> None:
    arguments = [write_config_file(), "max_staleness=1", "verl.trainer.nnodes=2"]
    outcome = sdpo("verl", *arguments, "rollout.n_gpus_per_node=3", "--dry-run")
    assert outcome.code == 0
    resolved, _, memory = outcome.out.partition("tokens per step: at most ")
    assert "verl:\n  trainer.nnodes: 2\n" in resolved
    assert "actor on each of 2 GPUs, peak" in memory and "sampler on each of 3 GPUs, peak" in memory
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.yaml"]
    printed = sdpo("verl", *arguments, "trainer.nnodes=4", "--show-command")
    assert printed.code == 0 and printed.out.strip().endswith("trainer.nnodes=2 trainer.nnodes=4")


def test_native_run_warns_once_about_verl_settings(
    sdpo: Callable[..., Outcome], write_config_file: WriteConfigFile
) -> None:
    outcome = sdpo("train", write_config_file(), "max_steps=1", "eval_steps=0", "verl.trainer.nnodes=2")
    assert outcome.code == 0
    assert (outcome.out + outcome.err).count("ignored by the native trainer: verl.trainer.nnodes") == 1


def test_data_command_writes_model_and_rows(
    sdpo: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = hidden_rule.Mode(length=5, num_rules=8, target_is_pretrained=True, pretrain_steps=2)
    monkeypatch.setitem(hidden_rule.MODES, "peers", short)
    outcome = sdpo("data", "hidden-rule", "--out", tmp_path / "x", "--mode", "peers", "--seed", 3)
    assert outcome.code == 0 and outcome.err == ""
    assert json.loads((tmp_path / "x" / "recipe.json").read_text())["seed"] == 3
    assert len(pq.read_table(tmp_path / "x" / "train.parquet")) == 3000
    HiddenRule(str(tmp_path / "x"), mode="peers", seed=3).prepare()  # as a run with these arguments does


def test_doctor_finds_the_native_trainer() -> None:
    done = subprocess.run([*COMMAND, "doctor"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^native +yes$", done.stdout, re.MULTILINE)
    assert re.search(rf"torch +>=2.6 +{re.escape(version('torch'))} +ok", done.stdout)


def test_doctor_exits_with_1_if_no_backend_runs(sdpo: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_version", lambda name: None)
    outcome = sdpo("doctor")
    assert outcome.code == 1 and outcome.err == ""
    assert re.search(r"^native +no: pip install .*'torch>=2.6'", outcome.out, re.MULTILINE)


@pytest.mark.slow
def test_run_export_and_report(
    sdpo: Callable[..., Outcome], write_config_file: WriteConfigFile, tmp_path: Path
) -> None:
    done = subprocess.run([*COMMAND, "train", write_config_file(), "seed=5"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert [row[STEP] for row in read_rows(tmp_path / "run")] == [0, 1, 2]
    assert f"run folder: {tmp_path}/run" in done.stdout
    assert "step 2/2" in done.stdout
    assert load_config(tmp_path / "run" / "run.yaml").seed == 5
    assert (tmp_path / "run" / "checkpoints" / "step_2" / "model.safetensors").is_file()

    checkpoint = tmp_path / "run" / "checkpoints" / "step_2"
    exported = sdpo("export", checkpoint, tmp_path / "teacher", "--teacher")
    assert (exported.code, exported.out) == (0, f"model: {tmp_path}/teacher\n")
    assert (tmp_path / "teacher" / "model.safetensors").is_file()
    assert get_error_line(sdpo("export", checkpoint, tmp_path / "teacher")).endswith(
        "exists already; name another folder\n"
    )

    outcome = sdpo("report", tmp_path / "run")
    assert outcome.code == 0
    assert f"plot: {tmp_path}/run/report.png" in outcome.out
    assert (tmp_path / "run" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (tmp_path / "run" / "report.html").read_text()


# --- user errors -----------------------------------------------------------------------------------------------------


def get_error_line(outcome: Outcome) -> str:
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("error: ") and outcome.err.endswith("\n")
    assert outcome.err.count("\n") == 1, outcome.err
    return outcome.err


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["optim.weight_decy=1"], ["unknown key optim.weight_decy", "did you mean optim.weight_decay?"]),
        (["optim.lr=fast"], ["optim.lr", "fast"]),
        (["optim.lr=-1"], ["optim.lr=-1.0: must be in (0, inf)"]),
        (["optim.lr"], ["override 'optim.lr' is not of the form key=value"]),
        (["data.train_files=[x.parquet]"], ["data.train_files: x.parquet: no such file"]),
        (["data.train_files=[]"], ["data.train_files is empty"]),
        (["data.task=hidden_rules"], ["data.task=hidden_rules: no such task; use figures, geo3k, hidden_rule"]),
        (["data.task_args.seed=x"], ["data.task_args.seed='x': must be an integer of at least 0"]),
        (["data.task_args.colour=red"], ["data.task_args: hidden_rule", "colour"]),
        (["model.path=./nowhere"], ["model.path: ./nowhere: no such folder"]),
        (["rollout.device=abacus"], ["rollout.device: no device 'abacus'"]),
        (["data.max_prompt_length=9"], ["row 0 has 16 prompt tokens, more than 9 (data.max_prompt_length)"]),
        (["rollout.max_response_length=250"], ["16 prompt tokens, more than 6 (the model's window of 256 minus"]),
        (
            ["tracking.report_to=[abacus]"],
            ["tracking.report_to=['abacus']: must be one of tensorboard, wandb, trackio"],
        ),
    ],
    ids=lambda value: value[0] if "=" in value[0] else "",
)
def test_invalid_setting(
    sdpo: Callable[..., Outcome],
    write_config_file: WriteConfigFile,
    tmp_path: Path,
    overrides: list[str],
    fragments: list[str],
) -> None:
    error = get_error_line(sdpo("train", write_config_file(), *overrides))
    for fragment in fragments:
        assert fragment in error
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"], "a user error must not leave a run folder"


def test_missing_config_file(sdpo: Callable[..., Outcome], tmp_path: Path) -> None:
    assert f"{tmp_path}/none.yaml: no such config file" in get_error_line(sdpo("train", tmp_path / "none.yaml"))


def test_report_of_a_folder_without_a_run(sdpo: Callable[..., Outcome], tmp_path: Path) -> None:
    assert f"{tmp_path}: no metrics.jsonl" in get_error_line(sdpo("report", tmp_path))


def test_empty_data_set(sdpo: Callable[..., Outcome], write_config_file: WriteConfigFile, tmp_path: Path) -> None:
    file, empty = write_config_file(), tmp_path / "empty.parquet"
    schema = pq.read_table(load_config(file).data.train_files[0]).schema
    pq.write_table(pa.Table.from_pylist([], schema=schema), empty)
    assert f"data.val_files: {empty}: no rows" in get_error_line(sdpo("train", file, f"data.val_files=[{empty}]"))
    assert not (tmp_path / "run").exists()


def test_model_without_a_chat_template(
    sdpo: Callable[..., Outcome], write_config_file: WriteConfigFile, hidden_rule_dir: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(hidden_rule_dir / "model", tmp_path / "model"))
    (model / "chat_template.jinja").unlink()
    error = get_error_line(sdpo("train", write_config_file(), f"model.path={model}"))
    assert "model.path: its tokenizer has no chat template" in error
    assert not (tmp_path / "run").exists()


def test_output_dir_with_other_files(
    sdpo: Callable[..., Outcome], write_config_file: WriteConfigFile, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    assert "exists and is no run folder" in get_error_line(sdpo("train", write_config_file()))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_reward_function_without_a_finite_score(
    sdpo: Callable[..., Outcome], write_config_file: WriteConfigFile, tmp_path: Path
) -> None:
    (tmp_path / "task.py").write_text("def compute_score(row, response):\n    return float('nan')")
    file = write_config_file()
    text = file.read_text()
    start, end = text.index("  task_args:"), text.index("  train_files")
    arguments = text[start:end]
    file.write_text(
        text.replace(arguments, "").replace("${data.task_args.dir}", load_config(file).data.task_args["dir"])
    )
    outcome = sdpo("train", file, f"data.task={tmp_path}/task.py")
    assert outcome.code == 2
    assert outcome.err.startswith("error: data.task: scoring failed for 1 of the 1 responses")
    reason = "InvalidRewardError: the score must be a finite number, got nan"
    assert outcome.err.endswith(f"{reason} ({tmp_path}/task.py:1)\n")
    assert outcome.err.count("\n") == 1


@pytest.mark.slow
def test_missing_column_in_a_separate_process(write_config_file: WriteConfigFile, tmp_path: Path) -> None:
    """The output contains only the error, no messages of libraries."""
    file, wrong = write_config_file(), tmp_path / "wrong.parquet"
    table = pq.read_table(load_config(file).data.train_files[0])
    pq.write_table(table.rename_columns(["data_source", "question", "ability", "reward_model", "extra_info"]), wrong)
    done = subprocess.run([*COMMAND, "train", file, f"data.train_files=[{wrong}]"], capture_output=True, text=True)
    error = get_error_line(Outcome(done.returncode, done.stdout, done.stderr))
    assert f"data.train_files: {wrong}: column 'prompt' is missing; it has data_source, question, ability" in error
    assert not (tmp_path / "run").exists()


def test_error_in_the_task_is_one_line_with_type_and_location(
    sdpo: Callable[..., Outcome], write_config_file: WriteConfigFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_key_error(*_: Any) -> None:
        raise KeyError("score")

    monkeypatch.setattr(HiddenRule, "compute_score", raise_key_error)
    error = get_error_line(sdpo("train", write_config_file()))
    assert "test.parquet: row 0: KeyError: 'score' (" in error and "test_cli.py:" in error


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("max_staleness", "num_rows"),
    [(0, 3), (1, 3), (1, 0)],
    ids=["in turn", "overlapped", "while the sampler starts"],
)
def test_ctrl_c_saves_and_stops(
    write_config_file: WriteConfigFile, tmp_path: Path, max_staleness: int, num_rows: int
) -> None:
    """Every process of the run gets SIGINT, as in a terminal."""
    overrides = [f"max_staleness={max_staleness}", "max_steps=100000", "eval.val_before_train=false"]
    output_dir = tmp_path / "run"
    process = subprocess.Popen(
        [*COMMAND, "train", write_config_file(), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that runs the tests in the background makes them and their child processes ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while not (output_dir / "metrics.jsonl").exists() or len(read_rows(output_dir)) < num_rows:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0 if num_rows else 1.5)
        os.killpg(process.pid, signal.SIGINT)
        sent = time.monotonic()
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 130, err
    assert err == "stopped by SIGINT; add --resume to continue\n"
    assert f"run folder: {output_dir}" in out
    assert time.monotonic() - sent < 20
    [checkpoint] = (output_dir / "checkpoints").iterdir()
    last = int(read_rows(output_dir)[-1][STEP]) if num_rows else 0
    assert checkpoint.name in (f"step_{last}", f"step_{last + 1}")
    AutoModelForCausalLM.from_pretrained(checkpoint)
