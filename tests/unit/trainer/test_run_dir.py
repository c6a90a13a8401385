"""The output folder of a run: its files, and that earlier files are never destroyed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from sdpo.config.loader import load_config, to_yaml
from sdpo.config.root import SDPOConfig
from sdpo.errors import SDPOError
from sdpo.observability import metrics
from sdpo.observability.progress import NullCallback, ProgressCallback
from sdpo.prompting.tokenization import TeacherPrompt
from sdpo.trainer.data.samples import TrainingSample
from sdpo.trainer.logging import trackers
from sdpo.trainer.logging.run_dir import RunDir

MakeRun = Callable[..., SDPOConfig]
MakeSample = Callable[..., TrainingSample]


class RecordingCallback(NullCallback):
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def on_metrics(self, step: int, values: Any) -> None:
        self.rows.append((step, dict(values)))


def open_run_dir(
    config: SDPOConfig, progress: ProgressCallback | None = None, resumed_step: int | None = None
) -> RunDir:
    folder = RunDir(Path(config.output_dir), config.tracking, progress or NullCallback(), resumed_step)
    folder.write_config(to_yaml(config), asdict(config))
    return folder


def test_written_config_loads_to_an_equal_config(make_run: MakeRun) -> None:
    config = make_run(
        data__task_args={"dir": "x", "num_train": 3},
        data__train_files=["a.parquet", "b.parquet"],
        self_distillation__is_clip=None,
        self_distillation__reprompt_template="{prompt}: {solution}\n'{feedback}'\n",
        tracking__name="ünïcode",
    )
    folder = open_run_dir(config)
    folder.close()
    assert load_config(Path(config.output_dir) / "run.yaml") == config
    assert folder.path == Path(config.output_dir)


def test_versions_of_installed_packages_are_written(make_run: MakeRun) -> None:
    folder = open_run_dir(make_run())
    folder.close()
    versions = json.loads((folder.path / "versions.json").read_text())
    assert {name: versions[name] for name in ("torch", "transformers")} == {
        name: version(name) for name in ("torch", "transformers")
    }
    assert {"python", "platform", "sdpo"} <= versions.keys()


def test_rows_reach_file_and_callback_immediately(make_run: MakeRun) -> None:
    callback = RecordingCallback()
    folder = open_run_dir(make_run(), callback)
    folder.log(0, {metrics.LOSS: 1, "a": 2.5})
    folder.log(1, {metrics.LOSS: 0.5})
    rows = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{metrics.STEP: 0, metrics.LOSS: 1, "a": 2.5}, {metrics.STEP: 1, metrics.LOSS: 0.5}]
    assert callback.rows == [(0, rows[0]), (1, rows[1])]
    assert folder.final == {metrics.STEP: 1, metrics.LOSS: 0.5, "a": 2.5}
    folder.close()


def test_earlier_run_is_moved_aside(make_run: MakeRun, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    contents = []
    for number in range(3):
        folder = open_run_dir(make_run(seed=number))
        folder.log(0, {metrics.LOSS: number})
        folder.close()
        contents.append((folder.path / "metrics.jsonl").read_text())
    path = folder.path
    assert (path / "metrics.jsonl").read_text() == contents[2]
    assert (path.with_name("run.1") / "metrics.jsonl").read_text() == contents[0]
    assert (path.with_name("run.2") / "metrics.jsonl").read_text() == contents[1]
    assert caplog.messages == [f"output_dir={path}: moved the earlier run to {path}.{k}" for k in (1, 2)]


def test_empty_folder_is_used(make_run: MakeRun) -> None:
    config = make_run()
    Path(config.output_dir).mkdir()
    open_run_dir(config).close()
    assert [p.name for p in Path(config.output_dir).parent.iterdir()] == ["run"]


@pytest.mark.parametrize("as_file", [False, True])
def test_folder_of_another_program_is_refused_and_unchanged(make_run: MakeRun, as_file: bool) -> None:
    config = make_run()
    path = Path(config.output_dir)
    if as_file:
        path.write_text("years of work")
    else:
        path.mkdir()
        (path / "thesis.txt").write_text("years of work")
    with pytest.raises(SDPOError, match=rf"^output_dir={path}: exists and is no run folder; name another folder$"):
        open_run_dir(config)
    assert (path if as_file else path / "thesis.txt").read_text() == "years of work"
    assert as_file or [p.name for p in path.iterdir()] == ["thesis.txt"]


def test_folder_that_cannot_be_created_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SDPOError, match=r"^output_dir=.*/file/run: cannot be written \(Not a directory\)$"):
        open_run_dir(make_run(output_dir=str(tmp_path / "file" / "run")))


# --- rollouts


def add_texts(sample: TrainingSample, number: int) -> TrainingSample:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Solution: {number}?"}]
    return replace(
        sample,
        rollout=replace(sample.rollout, response=f"answer {number}", score=0.25, feedback=f"feedback {number}"),
        context=replace(sample.context, prompt=TeacherPrompt([1, 2], messages, truncated=number == 2)),
    )


def test_rollout_file_has_prompt_response_and_teacher_context(make_run: MakeRun, make_sample: MakeSample) -> None:
    folder = open_run_dir(make_run(tracking__log_completions_steps=2, tracking__num_completions=8))
    samples = [add_texts(make_sample([3], [4, 2], advantage=-0.5), k) for k in range(3)]
    truncated = replace(samples[0].response, finished=False)
    without = make_sample([3], [4])
    samples.append(replace(without, rollout=replace(without.rollout, response="no teacher"), response=truncated))
    folder.save_rollouts(1, samples)
    folder.close()
    text = (folder.path / "rollouts" / "step_1.txt").read_text()
    blocks = text.split("=== ")[1:]
    assert len(blocks) == 4
    assert blocks[1] == (
        "score 0.25, advantage -0.5, 2 tokens\n--- prompt\n[user] ?\n--- response\nanswer 1\n--- ground truth\n!\n"
        "--- feedback\nfeedback 1\n--- teacher's prompt\n[system] Be brief.\n[user] Solution: 1?\n\n"
    )
    assert "--- teacher's prompt (truncated)\n" in blocks[2]
    assert "--- response (truncated)\nno teacher\n" in blocks[3]
    assert blocks[3].endswith("--- feedback\n(none)\n--- teacher's prompt\n(not distilled)\n")


@pytest.mark.parametrize(("every", "expected"), [(2, [1, 2, 4]), (1, [1, 2, 3, 4, 5]), (10, [1]), (0, [])])
def test_rollouts_are_written_at_the_configured_interval(
    make_run: MakeRun, make_sample: MakeSample, every: int, expected: list[int]
) -> None:
    folder = open_run_dir(make_run(tracking__log_completions_steps=every))
    for step in range(1, 6):
        folder.save_rollouts(step, [make_sample([3], [4])])
    folder.close()
    written = sorted((folder.path / "rollouts").glob("*")) if expected else []
    assert [p.name for p in written] == [f"step_{step}.txt" for step in expected]
    assert expected or not (folder.path / "rollouts").exists()


@pytest.mark.parametrize(("num_samples", "expected"), [(2, [0, 1]), (3, [0, 1, 2]), (7, [0, 2, 4]), (30, [0, 10, 20])])
def test_written_rollouts_are_spread_over_the_batch(
    make_run: MakeRun, make_sample: MakeSample, num_samples: int, expected: list[int]
) -> None:
    folder = open_run_dir(make_run(tracking__num_completions=3))
    folder.save_rollouts(1, [add_texts(make_sample([3], [4]), k) for k in range(num_samples)])
    folder.close()
    text = (folder.path / "rollouts" / "step_1.txt").read_text()
    assert [int(part.split()[1]) for part in text.split("--- response\n")[1:]] == expected


# --- trackers


def test_missing_tracker_is_refused_before_the_folder_changes(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_run_dir(make_run()).close()

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(trackers.importlib, "import_module", missing)
    config = make_run(tracking__report_to=["wandb"])
    with pytest.raises(SDPOError, match=r"^tracking\.report_to=wandb: is not installed; pip install 'sdpo\[wandb\]'$"):
        open_run_dir(config)
    assert [p.name for p in Path(config.output_dir).parent.iterdir()] == ["run"]


class FakeTracker:
    """Records the calls of wandb and trackio."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def init(self, **arguments: Any) -> None:
        self.calls.append(("init", arguments))

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append(("log", (step, values)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


@pytest.mark.parametrize("backend", ["wandb", "trackio"])
@pytest.mark.parametrize(("name", "expected_name"), [(None, "run"), ("mine", "mine")])
def test_rows_reach_wandb_and_trackio(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, backend: str, name: str | None, expected_name: str
) -> None:
    fake = FakeTracker()
    monkeypatch.setattr(trackers.importlib, "import_module", {backend: fake}.__getitem__)
    config = make_run(tracking__report_to=[backend], tracking__project="p", tracking__name=name)
    folder = open_run_dir(config)
    folder.log(3, {metrics.LOSS: 0.5})
    folder.close()
    [(_, arguments), (_, row), _] = fake.calls
    assert [call for call, _ in fake.calls] == ["init", "log", "finish"]
    assert (arguments["project"], arguments["name"]) == ("p", expected_name)
    assert arguments["config"]["optim"]["lr"] == config.optim.lr
    assert row == (3, {metrics.STEP: 3, metrics.LOSS: 0.5})


def test_rows_reach_tensorboard(make_run: MakeRun) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = open_run_dir(make_run(tracking__report_to=["tensorboard"]))
    for step in range(3):
        folder.log(step, {metrics.LOSS: 0.5 * step})
    folder.close()
    events = EventAccumulator(str(folder.path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars(metrics.LOSS)] == [(0, 0.0), (1, 0.5), (2, 1.0)]


def test_incomplete_last_line_of_a_killed_run_is_removed(make_run: MakeRun) -> None:
    folder = open_run_dir(config := make_run())
    for step in (1, 2, 3):
        folder.log(step, {metrics.LOSS: step})
        folder.log_health_event({"step": step})
    folder.close()
    for name in ("metrics.jsonl", "health_events.jsonl"):
        with (folder.path / name).open("a") as file:
            file.write('{"step": 4, "tr')
    open_run_dir(config, resumed_step=2).close()
    kept = [(folder.path / name).read_text() for name in ("metrics.jsonl", "health_events.jsonl")]
    assert kept == [json.dumps({metrics.STEP: 1, metrics.LOSS: 1.0}) + "\n", '{"step": 1}\n{"step": 2}\n']
