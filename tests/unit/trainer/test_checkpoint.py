"""Checkpoints are complete or absent, damage is found, and old ones are pruned except the best."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sdpo.errors import SDPOError
from sdpo.trainer.checkpoint import manager
from sdpo.trainer.checkpoint.manager import (
    find_newest,
    prune_checkpoints,
    read_manifest,
    save_checkpoint,
    verify_checkpoint,
)


def write(folder: Path) -> None:
    (folder / "weights").write_bytes(b"0123456789")
    (folder / "teacher").mkdir()
    (folder / "teacher" / "weights").write_bytes(b"abc")


def write_other(folder: Path) -> None:
    (folder / "weights").write_bytes(b"other")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_manifest_lists_every_file(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 3, 0.5, write)
    assert folder == tmp_path / "step_3"
    assert names(tmp_path) == ["step_3"]
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.score) == (3, 0.5)
    # computed by sha256sum
    assert manifest.files == {
        "weights": (10, "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882"),
        "teacher/weights": (3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
    }
    assert verify_checkpoint(folder) is None


@pytest.mark.parametrize("fails", ["write", "_fsync_and_hash", "_sync", "rename"])
def test_failure_at_any_moment_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    save_checkpoint(tmp_path, 3, None, write)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if fails == "rename":
            patch.setattr(Path, "rename", fail)
        elif fails != "write":
            patch.setattr(manager, fails, fail)
        save_checkpoint(tmp_path, 4, None, fail if fails == "write" else write_other)
    assert names(tmp_path) == [".step_4.partial", "step_3"]
    assert find_newest(tmp_path) == tmp_path / "step_3"
    save_checkpoint(tmp_path, 4, None, write_other)
    assert names(tmp_path) == ["step_3", "step_4"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("name", "damage", "fault"),
    [
        ("weights", truncate, "weights has 9 bytes, not 10"),
        ("teacher/weights", flip, "teacher/weights has another checksum"),
        ("teacher/weights", Path.unlink, "teacher/weights is missing"),
        ("manifest.json", truncate, None),
        ("manifest.json", flip, "manifest.json: JSONDecodeError"),
        ("manifest.json", Path.unlink, "manifest.json: FileNotFoundError"),
    ],
)
def test_damaged_checkpoint_is_reported_and_the_earlier_one_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], None], fault: str | None
) -> None:
    for step in (9, 10):
        save_checkpoint(tmp_path, step, None, write)
    damage(tmp_path / "step_10" / name)
    if fault is None:  # only the newline at the end is missing
        assert find_newest(tmp_path) == tmp_path / "step_10"
        return
    assert find_newest(tmp_path) == tmp_path / "step_9"
    [message] = caplog.messages
    assert message.startswith(f"{tmp_path / 'step_10'} is damaged ({fault}")
    assert message.endswith("; trying the checkpoint before it")
    save_checkpoint(tmp_path, 10, None, write_other)
    assert find_newest(tmp_path) == tmp_path / "step_10"
    assert names(tmp_path) == ["step_10", "step_9"]


def test_no_checkpoint_is_found_if_all_are_damaged_or_absent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert find_newest(tmp_path / "nowhere") is None
    save_checkpoint(tmp_path, 1, None, write)
    (tmp_path / "step_1" / "weights").unlink()
    assert find_newest(tmp_path) is None
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("save_total_limit", "save_best_limit", "kept"),
    [
        (1, 0, [6]),
        (2, 0, [5, 6]),
        (1, 1, [4, 6]),  # steps 2 and 4 have equal scores; the newer is kept
        (1, 2, [2, 4, 6]),
        (1, 3, [1, 2, 4, 6]),
        (9, 0, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_latest_and_best_checkpoints_are_kept(
    tmp_path: Path, save_total_limit: int, save_best_limit: int, kept: list[int]
) -> None:
    for step, score in enumerate([0.2, 0.9, None, 0.9, None, 0.1], start=1):
        save_checkpoint(tmp_path, step, score, write_other)
    prune_checkpoints(tmp_path, save_total_limit, save_best_limit)
    assert names(tmp_path) == [f"step_{step}" for step in kept]


def test_unwritable_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("no folder")
    with pytest.raises(
        SDPOError, match=r"step_1: cannot be saved \(.*Not a directory.*\); earlier checkpoints are intact"
    ):
        save_checkpoint(tmp_path / "checkpoints", 1, None, write)


def test_internal_error_is_raised_unchanged(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise RuntimeError("a shape is wrong")

    with pytest.raises(RuntimeError, match="a shape is wrong"):
        save_checkpoint(tmp_path, 1, None, fail)
    assert names(tmp_path) == []
