import json
import math

import pytest

from sdpo.errors import SDPOError
from sdpo.observability.metrics import RENAMED_METRICS, STEP, find_accuracies
from sdpo.report.run_dir import read_run, read_runs


def test_series_final_and_best(write_run):
    run = read_run(
        write_run("a", {0: {"acc": 0.1}, 1: {"score": 1, "acc": 0.5}, 2: {"score": 2.5}, 3: {"score": 2, "acc": 0.4}})
    )
    assert run.series("score") == ([1, 2, 3], [1.0, 2.5, 2.0])
    assert run.series("acc") == ([0, 1, 3], [0.1, 0.5, 0.4])
    assert (run.final("score"), run.best("score")) == (2.0, 2.5)
    assert (run.final("acc"), run.best("acc")) == (0.4, 0.5)
    assert run.last_step == 3
    assert (run.series("none"), run.final("none"), run.best("none")) == (([], []), None, None)


def test_nonfinite_values_are_kept_and_never_the_best(write_run):
    run = read_run(write_run("a", {1: {"x": math.inf}, 2: {"x": 3.0}, 3: {"x": math.nan}}))
    assert run.series("x")[1][:2] == [math.inf, 3.0]
    assert run.best("x") == 3.0
    assert math.isnan(run.final("x"))


def test_entries_that_are_no_numbers_are_skipped(write_run):
    run = read_run(write_run("a", {1: {"x": None, "y": "text", "z": 4}}))
    assert dict(run.rows[0]) == {"training/global_step": 1.0, "z": 4.0}


def test_incomplete_last_line_is_skipped(write_run):
    folder = write_run("a", {1: {"x": 1}, 2: {"x": 2}})
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"training/global_step": 3, "x')
    assert read_run(folder).series("x") == ([1, 2], [1, 2])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"x": ', "not a JSON object (Expecting value); fix or remove the line"),
        ("[1]", "not a JSON object; fix or remove the line"),
        ('{"x": 1}', "no number under training/global_step; fix or remove the line"),
        ('{"training/global_step": NaN}', "no number under training/global_step; fix or remove the line"),
    ],
)
def test_malformed_line_is_reported(tmp_path, line, message):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"training/global_step": 1}\n\n' + line + '\n{"training/global_step": 2}\n')
    with pytest.raises(SDPOError) as error:
        read_run(tmp_path)
    assert str(error.value) == f"{file}:3: {message}"


def test_missing_folder_missing_file_and_empty_file_are_one_line_each(tmp_path):
    def message(folder):
        with pytest.raises(SDPOError) as error:
            read_run(folder)
        return str(error.value)

    assert message(tmp_path / "no") == f"{tmp_path}/no: no such run folder; give the output_dir of a run"
    assert message(tmp_path).startswith(f"{tmp_path}: no metrics.jsonl; ")
    (tmp_path / "metrics.jsonl").write_text("\n")
    assert message(tmp_path) == f"{tmp_path}/metrics.jsonl: no metrics yet; wait for the first step"
    (tmp_path / "metrics.jsonl").write_text('{"training/global_step": 0}\n')
    (tmp_path / "run.yaml").write_text("a: [")
    assert message(tmp_path).startswith(f"{tmp_path}/run.yaml: not a YAML file: ")
    assert "\n" not in message(tmp_path)


def test_resumed_run_replaces_rows_after_its_checkpoint(write_run):
    steps = [(1, 10), (2, 20), (3, 30), (4, 40), (3, 33), (4, 44)]
    run = read_run(write_run("a", [{"training/global_step": step, "x": x} for step, x in steps]))
    assert run.series("x") == ([1, 2, 3, 4], [10, 20, 33, 44])
    cut_short = read_run(write_run("b", [{"training/global_step": step, "x": x} for step, x in steps[:-1]]))
    assert cut_short.series("x") == ([1, 2, 3], [10, 20, 33])


def test_two_lines_of_one_step_are_one_row(write_run):
    run = read_run(write_run("a", [{"training/global_step": 1, "x": 1}, {"training/global_step": 1, "y": 2}]))
    assert [dict(row) for row in run.rows] == [{"training/global_step": 1, "x": 1, "y": 2}]


def test_settings_are_flat_and_tracking_name_is_the_run_name(write_run):
    folder = write_run("a", {1: {}}, seed=3, optim={"lr": 0.1}, data={"task_args": {}}, tracking={"name": "mine"})
    run = read_run(folder)
    assert run.name == "mine"
    assert run.settings == {"seed": 3, "optim.lr": 0.1, "data.task_args": {}, "tracking.name": "mine"}


def test_names_default_to_the_folder_and_are_unique(write_run, monkeypatch):
    folders = [write_run(name, {1: {}}) for name in ("x/first/run", "y/first/run", "other")]
    assert [run.name for run in read_runs([*folders, folders[0] / ".." / "run"])] == [
        "x/first/run",
        "y/first/run",
        "other",
    ]
    monkeypatch.chdir(folders[2])
    assert read_run(".").name == "other"


def test_headline_accuracy_is_mean_at_1_or_the_next_metric():
    names = [
        "val-core/a/acc/mean@8",
        "val-core/a/acc/mean@1",
        "val-core/hub/name/acc/mean@16",
        "val-core/a/acc/best@8",
        "val-teacher/b/acc/mean@1",
    ]
    assert find_accuracies(names) == {"a": "mean@1", "hub/name": "mean@16"}


def test_rows_in_the_format_of_verl_are_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "data": {"critic/score/mean": 0.25}}\n{"step": 2, "data": {"actor/lr": 0.5, "note": "text"}}\n'
    )
    run = read_run(tmp_path)
    assert run.rows == [{STEP: 0, "critic/score/mean": 0.25}, {STEP: 2, "actor/lr": 0.5}]


def test_earlier_metric_names_are_replaced(tmp_path):
    old = {name: float(i) for i, name in enumerate(RENAMED_METRICS, 1)}
    old |= {
        "self_distillation/success_sample_fraction": 0.5,
        "self_distillation/success_sample_fraction/ci95_low": 0.25,
        "self_distillation/teacher_student_log_prob_gap/ci95_high": 20.0,
        "val-teacher/hub/name/gain/mean@1": 0.75,
        "val-teacher/hub/name/gain/mean@1/ci95_low": 0.5,
    }
    (tmp_path / "metrics.jsonl").write_text(json.dumps({STEP: 1, **old, "critic/score/mean": 0.125}) + "\n")
    (row,) = read_run(tmp_path).rows
    assert row == {
        STEP: 1,
        "reward/num_failures": 1,
        "val-aux/reward/num_failures": 2,
        "self_distillation/loss_coef": 3,
        "self_distillation/reprompt_sample_fraction": 4,
        "self_distillation/solution_used_fraction": 5,
        "self_distillation/teacher_student_logprob_diff/mean": 6,
        "self_distillation/teacher_student_logprob_diff/positive_frac": 7,
        "self_distillation/teacher_student_logprob_diff/positive_part": 8,
        "self_distillation/teacher_student_logprob_diff/negative_part": 9,
        "training/off_policy/trajectory_staleness/mean": 10,
        "actor/ref_kl": 11,
        "health/num_warnings": 12,
        "timing_s/wait_for_enough_samples": 13,
        "self_distillation/rollout_success_fraction": 0.5,
        "self_distillation/rollout_success_fraction/ci95_low": 0.25,
        "self_distillation/teacher_student_logprob_diff/mean/ci95_high": 20.0,
        "val-teacher/hub/name/acc_minus_student/mean@1": 0.75,
        "val-teacher/hub/name/acc_minus_student/mean@1/ci95_low": 0.5,
        "critic/score/mean": 0.125,
    }


def test_current_metric_names_are_unchanged(write_run):
    row = {"self_distillation/success_sample_fraction": 0.5, "self_distillation/reprompt_sample_fraction": 0.75}
    assert read_run(write_run("a", {1: row})).rows == [{STEP: 1, **row}]


@pytest.mark.parametrize("file", ["health_events.jsonl", "alarms.jsonl"])
def test_failed_health_checks_are_read_up_to_the_last_step(write_run, file):
    folder = write_run("a", {1: {}, 2: {}})
    events = [{"step": step, "rule": "score_collapse"} for step in (1, 2, 3)]
    (folder / file).write_text("".join(json.dumps(event) + "\n" for event in events) + '[1]\n{"step": 2, "ru')
    assert read_run(folder).health_events == events[:2]
