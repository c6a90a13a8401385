"""Geometry3k's files: their content, skipped rows, and requirements of a source."""

from __future__ import annotations

import logging
import os
import runpy
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdpo import cli
from sdpo.errors import SDPOError
from sdpo.rewards.geo3k import data
from sdpo.rewards.geo3k.data import build_row, prepare
from sdpo.rewards.rows import load_rows

datasets = pytest.importorskip("datasets")
Image = pytest.importorskip("PIL.Image")

EXAMPLE = Path(__file__).parents[3] / "examples" / "data_preprocess" / "geo3k.py"


class Recorder:
    """Records the calls."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int, int]] = []

    def on_progress(self, description: str, done: int, total: int) -> None:
        self.steps.append((description, done, total))

    def on_metrics(self, step: int, values: Any) -> None:
        raise AssertionError("preparation has no metrics")


def picture(red: int = 0, kind: str = "PNG") -> bytes:
    file = BytesIO()
    Image.new("RGB", (40, 30), (red, 20, 30)).save(file, kind)
    return file.getvalue()


def source_row(number: int = 0, **changes: Any) -> dict[str, Any]:
    image = {"bytes": picture(number), "path": f"/somewhere/{number}.png"}
    return {"images": [image], "problem": f"<image>Find x{number}.", "answer": str(number), **changes}


def features() -> Any:
    text = datasets.Value("string")
    return datasets.Features({"images": datasets.Sequence(datasets.Image()), "problem": text, "answer": text})


def make_splits(**rows: list[dict[str, Any]]) -> Any:
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_list(records, features=features()) for name, records in rows.items()}
    )


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(params=["parquet", "parquet in data/", "saved"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Three rows of training, one of validation and two of test, in each form that a local copy may have."""
    splits = make_splits(
        train=[source_row(i) for i in range(3)], validation=[source_row(9)], test=[source_row(i) for i in range(3, 5)]
    )
    folder = tmp_path / "source"
    if request.param == "saved":
        splits.save_to_disk(folder)
        return folder
    files = folder / "data" if request.param == "parquet in data/" else folder
    files.mkdir(parents=True)
    for name, split in splits.items():
        split.to_parquet(files / f"{name}-00000-of-00001.parquet")
    return folder


@pytest.fixture
def save(tmp_path: Path) -> Any:
    def save(**rows: list[dict[str, Any]]) -> Path:
        make_splits(**rows).save_to_disk(tmp_path / "source")
        return tmp_path / "source"

    return save


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- written files ---------------------------------------------------------------------------------------------------


def test_files_have_the_rows_of_verl(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "sdpo")
    progress = Recorder()
    before = sorted(source.rglob("*"))
    assert prepare(tmp_path / "out" / "geo3k", source, progress) == {"train": 3, "test": 2}
    assert names(tmp_path / "out" / "geo3k") == ["test.parquet", "train.parquet"]
    assert names(tmp_path / "out") == ["geo3k"]
    assert sorted(source.rglob("*")) == before
    assert caplog.messages == ["train: 3 rows", "test: 2 rows"]
    assert progress.steps == [
        *(("reading train", done, 3) for done in (1, 2, 3)),
        *(("reading test", done, 2) for done in (1, 2)),
    ]
    row = pq.read_table(tmp_path / "out" / "geo3k" / "test.parquet").to_pylist()[1]
    assert row == {
        "data_source": "hiyouga/geometry3k",
        "prompt": [
            {
                "role": "user",
                "content": "<image>Find x4. You FIRST think about the reasoning process as an internal monologue and "
                "then provide the final answer. The reasoning process MUST BE enclosed within <think> </think> tags. "
                "The final answer MUST BE put in \\boxed{}.",
            }
        ],
        "images": [{"bytes": picture(4), "path": "4.png"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"split": "test", "index": 1, "answer": "4", "question": "<image>Find x4."},
    }


def test_file_permissions(source: Path, tmp_path: Path) -> None:
    prepare(tmp_path / "out", source)
    file = str(tmp_path / "out" / "train.parquet")
    rows = load_rows([file], "data.train_files")
    assert [row.ground_truth for row in rows] == ["0", "1", "2"]
    assert rows[2].extra_info["index"] == 2
    loaded = datasets.load_dataset("parquet", data_files=file)["train"]
    [image] = loaded[2]["images"]
    assert (image.size, image.getpixel((0, 0))) == ((40, 30), (2, 20, 30))


def test_rows_are_written_in_batches_in_order(save: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(data, "BATCH_ROWS", 4)
    prepare(tmp_path / "out", save(train=[source_row(i) for i in range(10)], test=[source_row()]))
    file = pq.ParquetFile(tmp_path / "out" / "train.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [4, 4, 2]
    assert [row["index"] for row in file.read().column("extra_info").to_pylist()] == list(range(10))


def test_image_given_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(1, "JPEG"))
    row = build_row(source_row(images=[{"bytes": None, "path": str(tmp_path / "a.jpg")}]), "train", 0)
    assert row["images"] == [{"bytes": picture(1, "JPEG"), "path": "a.jpg"}]


def test_several_images() -> None:
    image = {"bytes": picture(), "path": None}
    row = build_row(source_row(images=[image, image], problem="<image> and <image>"), "train", 0)
    assert row["images"] == [image, image]


def test_old_files_are_replaced_only_by_complete_files(save: Any, tmp_path: Path, monkeypatch: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("train.parquet", "test.parquet", "other"):
        (out / name).write_text("old")
    source = save(train=[source_row()], test=[source_row()])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(logging.getLogger("sdpo.rewards.geo3k.data"), "info", interrupt)  # with train.parquet written
        with pytest.raises(KeyboardInterrupt):
            prepare(out, source)
    assert [(out / name).read_text() for name in names(out)] == ["old"] * 3
    assert names(tmp_path) == ["out", "source"]
    prepare(out, source)
    assert names(out) == ["other", "test.parquet", "train.parquet"]
    assert len(load_rows([str(out / name) for name in ("train.parquet", "test.parquet")], "x")) == 2


# --- rows that cannot be used ----------------------------------------------------------------------------------------

GIF = picture(kind="GIF")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answer": None}, "no answer"),
        ({"answer": ""}, "no answer"),
        ({"answer": " \n"}, "no answer"),
        ({"problem": None}, "no problem"),
        ({"problem": "\t"}, "no problem"),
        ({"problem": "Find x."}, "0 <image> tags in the problem for 1 images"),
        ({"problem": "<image><image>"}, "2 <image> tags in the problem for 1 images"),
        ({"problem": "<Image>"}, "0 <image> tags in the problem for 1 images"),
        ({"images": None}, "no image"),
        ({"images": []}, "no image"),
        ({"images": [], "problem": "Find x."}, "no image"),
        ({"images": [None]}, "image 1 is empty"),
        ({"images": [{"bytes": None, "path": None}]}, "image 1 is empty"),
        ({"images": [{"bytes": b"", "path": None}]}, "image 1 is empty"),
        ({"images": [{"bytes": b"", "path": "/etc/passwd"}]}, "image 1 is empty"),
        ({"images": [{"bytes": None, "path": "/nowhere/a.png"}]}, "image 1: /nowhere/a.png cannot be read"),
        ({"images": [{"bytes": None, "path": "/"}]}, "image 1: / cannot be read"),
        ({"images": [{"bytes": None, "path": "a\0"}]}, "image 1: a\0 cannot be read"),
        ({"images": [{"bytes": None, "path": "https://example.org/a.png"}]}, "https://example.org/a.png cannot be"),
        ({"images": [{"bytes": picture()[:60], "path": None}]}, "image 1 is not a"),
        ({"images": [{"bytes": picture()[:-30], "path": None}]}, "image 1 is not a"),
        ({"images": [{"bytes": picture()[:8], "path": None}]}, "image 1 is not a"),
        ({"images": [{"bytes": picture(kind="JPEG")[:-100], "path": None}]}, "image 1 is not a"),
        ({"images": [{"bytes": picture(kind="BMP")[:100], "path": None}]}, "image 1 is not a"),
        ({"images": [{"bytes": GIF[: len(GIF) // 2], "path": None}]}, "image 1 is not a"),
        ({"images": [{"bytes": picture().replace(b"IDAT", b"JDAT"), "path": None}]}, "image 1 is not a"),
        ({"images": [{"bytes": b"no image at all", "path": None}]}, "image 1 is not an image file that can be read"),
        ({"images": [{"bytes": b"\0" * 1000, "path": None}]}, "image 1 is not an image file that can be read"),
        ({"images": [{"bytes": b"<svg></svg>", "path": None}]}, "image 1 is not an image file that can be read"),
        (
            {
                "images": [{"bytes": picture(), "path": None}, {"bytes": b"x", "path": None}],
                "problem": "<image><image>",
            },
            "image 2 is not an image file that can be read",
        ),
    ],
)
def test_unusable_row_is_reported_and_skipped(
    tmp_path: Path, changes: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "sdpo")
    progress = Recorder()
    source = tmp_path / "source"
    source.mkdir()
    # Not by datasets, which would open the images.
    for split, rows in (("train", [source_row(0), source_row(1, **changes), source_row(2)]), ("test", [source_row()])):
        pq.write_table(pa.Table.from_pylist(rows, schema=features().arrow_schema), source / f"{split}.parquet")
    assert prepare(tmp_path / "out", source, progress) == {"train": 2, "test": 1}
    skipped, train, test = caplog.messages
    assert skipped.startswith("train row 1: ") and reason in skipped and skipped.endswith("; skipped")
    assert (train, test) == ("train: 2 rows, 1 skipped", "test: 1 rows")
    rows = load_rows([str(tmp_path / "out" / "train.parquet")], "x")
    assert [row.extra_info["index"] for row in rows] == [0, 2]


def test_image_too_large_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # the picture has 1200; PIL refuses at twice as many
    with pytest.raises(ValueError, match="image 1 is not a readable image"):
        build_row(source_row(), "train", 0)


def test_split_without_usable_rows(save: Any, tmp_path: Path) -> None:
    source = save(train=[source_row()], test=[source_row(answer=None), source_row(problem="")])
    with pytest.raises(
        SDPOError, match=r"^split 'test': no row of 2 can be used; name another data set with --source$"
    ):
        prepare(tmp_path / "out", source)
    assert names(tmp_path) == ["source"]


# --- sources that cannot be used -------------------------------------------------------------------------------------


def refusal(out: Path, source: str | Path) -> str:
    before = sorted(out.parent.rglob("*")) if out.parent.is_dir() else []
    with pytest.raises(SDPOError) as caught:
        prepare(out, source)
    assert "\n" not in str(caught.value)
    assert (sorted(out.parent.rglob("*")) if out.parent.is_dir() else []) == before
    return str(caught.value)


@pytest.mark.parametrize("name", ["hiyouga/geometry3k", "nonsuch", "a b", "", "x" * 300])
def test_hub_without_a_network(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(tmp_path / "out", name or "-")
    assert message.startswith(f"--source {name or '-'}: cannot be loaded (")
    assert message.endswith("; without a connection, name a local copy")


@pytest.mark.parametrize(
    "name", ["{tmp}/none", "./none", "~none/x", "a/b/c", "https://example.org/a.zip", "{tmp}/file"]
)
def test_missing_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    name = name.format(tmp=tmp_path)
    assert refusal(tmp_path / "out", name) == (
        f"--source {name}: no such folder; it must hold parquet files named by split"
    )


def test_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    assert "cannot be loaded (" in refusal(tmp_path / "out", tmp_path / "source")


@pytest.mark.parametrize("content", [b"", b"PAR1 and then nothing of the kind", b"\0" * 100])
def test_damaged_files(tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "source").mkdir()
    for split in ("train", "test"):
        (tmp_path / "source" / f"{split}.parquet").write_bytes(content)
    message = refusal(tmp_path / "out", tmp_path / "source")
    assert message.startswith(f"--source {tmp_path / 'source'}: cannot be loaded (")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("size", [10, 500, -2000])
def test_truncated_saved_data_set(save: Any, tmp_path: Path, size: int) -> None:
    source = save(train=[source_row(i) for i in range(50)], test=[source_row()])
    [file] = (source / "train").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:size])
    assert str(source) in refusal(tmp_path / "out", source)


def test_damage_found_while_reading_rows(save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def iterate(self: Any, batch_size: int) -> Any:
        raise OSError("bad block\nat 7")

    source = save(train=[source_row()], test=[source_row()])
    monkeypatch.setattr(datasets.Dataset, "iter", iterate)
    message = refusal(tmp_path / "out", source)
    assert message == "split 'train' is damaged (bad block); create it again or name another --source"


@pytest.mark.parametrize("missing", ["train", "test"])
def test_missing_split(save: Any, tmp_path: Path, missing: str) -> None:
    there = "test" if missing == "train" else "train"
    source = save(**{there: [source_row()], "validation": [source_row()]})
    assert refusal(tmp_path / "out", source) == f"--source {source}: has no split {missing!r}, only {there}, validation"


def test_single_split(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_splits(train=[source_row()])["train"].save_to_disk(source)
    assert refusal(tmp_path / "out", source) == f"--source {source}: is a single split; it must have train and test"


@pytest.mark.parametrize("column", ["images", "problem", "answer"])
def test_missing_column(tmp_path: Path, column: str) -> None:
    source = tmp_path / "source"
    make_splits(train=[source_row()], test=[source_row()]).rename_column(column, "other").save_to_disk(source)
    message = refusal(tmp_path / "out", source)
    assert message.startswith(f"--source {source}: split 'train' has no column {column!r}, only ")
    assert "other" in message


@pytest.mark.parametrize(("images", "stored"), [("a.png", "string"), (5, "int64"), (["a.png"], "list<item: string>")])
def test_column_without_images(tmp_path: Path, images: Any, stored: str) -> None:
    rows = datasets.Dataset.from_list([{"images": images, "problem": "<image>", "answer": "5"}])
    source = tmp_path / "source"
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(source)
    assert refusal(tmp_path / "out", source) == (
        f"--source {source}: column 'images' of split 'train' is {stored}, not a list of images"
    )


def test_source_is_not_overwritten(source: Path) -> None:
    assert refusal(source, source) == f"--out {source}: is the source folder; name another folder"


def test_target_that_is_no_folder(save: Any, tmp_path: Path) -> None:
    source = save(train=[source_row()], test=[source_row()])
    (tmp_path / "file").write_text("x")
    assert refusal(tmp_path / "file", source) == f"--out {tmp_path}/file: not a folder; name another"
    assert "cannot be written (Not a directory)" in refusal(tmp_path / "file" / "out", source)


def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = refusal(tmp_path / "out", tmp_path)
    assert message == "Geometry3k's data needs datasets; install it: pip install 'sdpo[geo3k]'"


# --- the commands ----------------------------------------------------------------------------------------------------


def test_command(source: Path, tmp_path: Path, monkeypatch: Any, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["sdpo", "data", "geo3k", "--out", str(out), "--source", str(source)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    printed = capfd.readouterr()
    assert printed.out.splitlines()[-1] == f"wrote {out}/train.parquet, {out}/test.parquet"
    assert "train: 3 rows\n" in printed.out
    assert printed.err == ""
    assert names(out) == ["test.parquet", "train.parquet"]


def test_command_without_a_network(tmp_path: Path, monkeypatch: Any, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["sdpo", "data", "geo3k", "--out", str(tmp_path / "out")])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    error = capfd.readouterr().err
    assert error.startswith("error: --source hiyouga/geometry3k: cannot be loaded (") and error.count("\n") == 1


def test_example_script_writes_the_same_files(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    prepare(tmp_path / "ours", source)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "argv", ["geo3k.py", "--source", str(source)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    theirs = Path(os.environ["HOME"]) / "data" / "geo3k"
    for name in ("train.parquet", "test.parquet"):
        assert pq.read_table(theirs / name) == pq.read_table(tmp_path / "ours" / name)


def test_example_script_reports_errors_in_one_line(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["geo3k.py", "--local_save_dir", str(tmp_path / "o"), "--source", "/none"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert ended.value.code == "error: --source /none: no such folder; it must hold parquet files named by split"
