"""The folder of a run on verl: ``resume_mode`` has the same effect as on the native trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from sdpo import load_config
from sdpo.config.loader import to_yaml
from sdpo.config.root import SDPOConfig
from sdpo.errors import SDPOError
from sdpo.verl_backend.config.to_verl import to_verl_overrides
from sdpo.verl_backend.entrypoint import launch
from sdpo.verl_backend.entrypoint.launch import build_command, open_folder

MakeRun = Callable[..., SDPOConfig]
EARLIER = {
    "run.yaml": "seed: 7\n",
    "metrics.jsonl": "{}\n",
    "health_events.jsonl": "{}\n",
    "rollouts/1.jsonl": "{}\n",
    "checkpoints/global_step_3/data.pt": "",
    "checkpoints/latest_checkpointed_iteration.txt": "3",
}


def write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def read(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def open_of(config: SDPOConfig, **trainer: str) -> contextlib.AbstractContextManager[object]:
    return open_folder(Path(config.output_dir), config.resume_mode, to_yaml(config), compose_trainer(config, **trainer))


def compose_trainer(config: SDPOConfig, **trainer: str) -> DictConfig:
    """Return the section of verl's configuration that ``open_folder`` reads."""
    translated = [override.partition("=") for override in to_verl_overrides(config).overrides]
    plain = {key.removeprefix("trainer."): value.strip('"') for key, _, value in translated if key[:8] == "trainer."}
    return OmegaConf.create({**plain, **trainer})


def open_once(config: SDPOConfig, **trainer: str) -> None:
    with open_of(config, **trainer):
        pass


def test_new_run_moves_the_earlier_run_to_a_numbered_folder(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_run(resume_mode="disable")
    folder = Path(config.output_dir)
    write(folder, EARLIER)
    open_once(config)
    assert read(folder.with_name(f"{folder.name}.1")) == EARLIER
    assert list(read(folder)) == ["run.yaml"] and load_config(folder / "run.yaml") == config
    assert f"moved the earlier run to {folder}.1" in capsys.readouterr().out
    open_once(config)
    assert list(read(folder.with_name(f"{folder.name}.2"))) == ["run.yaml"]


@pytest.mark.parametrize("resume_mode", ["auto", "required"])
def test_resumed_run_keeps_its_folder(resume_mode: str, make_run: MakeRun) -> None:
    """The earlier metrics file is renamed: verl's logger overwrites ``metrics.jsonl``."""
    config = make_run(resume_mode=resume_mode)
    folder = Path(config.output_dir)
    write(folder, EARLIER)
    open_once(config)
    kept = {name: text for name, text in EARLIER.items() if name not in ("run.yaml", "metrics.jsonl")}
    files = read(folder)
    assert files.pop("run.yaml") != EARLIER["run.yaml"]
    assert files == {**kept, "metrics.1.jsonl": "{}\n"}
    assert not folder.with_name(f"{folder.name}.1").exists()


@pytest.mark.parametrize("missing", ["latest_checkpointed_iteration.txt", "global_step_3/data.pt"])
def test_run_without_a_complete_checkpoint_is_new_or_refused(missing: str, make_run: MakeRun) -> None:
    config = make_run(resume_mode="auto")
    folder = Path(config.output_dir)
    files = {name: text for name, text in EARLIER.items() if name != f"checkpoints/{missing}"}
    write(folder, files)
    required = make_run(resume_mode="required", output_dir=str(folder))
    with pytest.raises(SDPOError, match=r"has no complete checkpoint to resume from; start with resume_mode=auto"):
        open_once(required)
    assert read(folder) == files
    open_once(config)
    assert read(folder.with_name(f"{folder.name}.1")) == files
    assert list(read(folder)) == ["run.yaml"]


def test_checkpoint_that_verl_resumes_from_is_not_moved(make_run: MakeRun) -> None:
    config = make_run(resume_mode="disable")
    folder = Path(config.output_dir)
    write(folder, EARLIER)
    open_once(config, resume_mode="resume_path", resume_from_path=f"{folder}/checkpoints/global_step_3")
    assert (folder / "checkpoints/global_step_3/data.pt").exists()
    open_once(config, resume_mode="auto")
    assert (folder / "checkpoints/global_step_3/data.pt").exists()


def test_folder_of_other_files_is_refused(make_run: MakeRun) -> None:
    config = make_run()
    write(Path(config.output_dir), {"notes.txt": "mine"})
    with pytest.raises(SDPOError, match="exists and is no run folder; name another folder"):
        open_once(config)
    assert read(Path(config.output_dir)) == {"notes.txt": "mine"}


@pytest.mark.parametrize("resume_mode", ["disable", "auto", "required"])
def test_second_run_in_the_same_folder_is_refused(resume_mode: str, make_run: MakeRun) -> None:
    config = make_run(resume_mode=resume_mode)
    write(Path(config.output_dir), EARLIER)
    first = make_run(resume_mode="auto", output_dir=config.output_dir)
    with open_of(first):
        with pytest.raises(SDPOError, match="another run is writing to it"):
            open_once(config)
        assert "checkpoints/global_step_3/data.pt" in read(Path(config.output_dir))
    open_once(config)


def test_run_starts_on_a_file_system_without_locks(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    config = make_run()
    open_once(config)
    assert list(read(Path(config.output_dir))) == ["run.yaml"]


def test_invalid_setting_does_not_move_the_earlier_run(make_task_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VERL_FILE_LOGGER_PATH", "VERL_PLATFORM", "OMP_NUM_THREADS", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        monkeypatch.setenv(name, "cpu" if name == "VERL_PLATFORM" else "1")
    config = make_task_run(resume_mode="disable")
    write(Path(config.output_dir), EARLIER)
    command = build_command(to_verl_overrides(config), config.output_dir, ["trainer.nodes_of_gpus=2"])
    with pytest.raises(SDPOError, match="nodes_of_gpus"):
        launch.launch(config, command)
    assert read(Path(config.output_dir)) == EARLIER
