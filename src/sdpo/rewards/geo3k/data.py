"""Convert the Geometry3k data set to parquet files in verl's schema."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdpo.errors import DataError, SDPOError
from sdpo.observability.progress import NullCallback, ProgressCallback
from sdpo.prompting.images import TAG, open_image

logger = logging.getLogger(__name__)

DATA_SOURCE = "hiyouga/geometry3k"
SPLITS = ("train", "test")
COLUMNS = ("images", "problem", "answer")
# The exact text of verl's example, so that runs can be compared.
INSTRUCTION = (
    r"You FIRST think about the reasoning process as an internal monologue and then provide the final answer. "
    r"The reasoning process MUST BE enclosed within <think> </think> tags. "
    r"The final answer MUST BE put in \boxed{}."
)
BATCH_ROWS = 64  # in memory at a time, with their images


def prepare(
    out: str | Path, source: str | Path = DATA_SOURCE, progress: ProgressCallback | None = None
) -> dict[str, int]:
    """Write ``train.parquet`` and ``test.parquet``.

    Both are written to a temporary folder and renamed when complete; existing files are replaced. The bytes of images
    are not changed. Rows that cannot be used are reported and skipped.

    Args:
        out: folder for the files; created if needed.
        source: name of a data set on the Hugging Face hub, or a folder: parquet files named by split, as in a clone of
            the data set, or the output of ``DatasetDict.save_to_disk``.
        progress: receives the number of rows read. Each skipped row and the number of rows per split are logged.

    Returns:
        Number of rows written, by split.

    Raises:
        DataError: ``datasets`` is not installed; the source cannot be loaded, or lacks a split or a column; no row of
            a split can be used; or the folder cannot be written or is the source.
    """
    target = Path(os.path.expanduser(out))
    progress = progress or NullCallback()
    folder = os.path.expanduser(source)
    if os.path.isdir(target) and os.path.isdir(folder) and os.path.samefile(target, folder):
        raise DataError(f"--out {target}: is the source folder; name another folder")
    if os.path.exists(target) and not os.path.isdir(target):
        raise DataError(f"--out {target}: not a folder; name another")
    splits = _load(str(source))
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        counts = {split: _write(splits[split], split, partial / f"{split}.parquet", progress) for split in SPLITS}
        target.mkdir(exist_ok=True)
        for split in SPLITS:
            os.replace(partial / f"{split}.parquet", target / f"{split}.parquet")
    except OSError as error:
        raise DataError(
            f"--out {target}: cannot be written ({error.strerror or error}); name another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return counts


def build_row(record: dict[str, Any], split: str, index: int) -> dict[str, Any]:
    """Build a row in verl's schema.

    Args:
        record: the row of the source; its images are stored as ``{"bytes": ..., "path": ...}``.
        split, index: position of the row in the source.

    Raises:
        ValueError: the row cannot be used; the message has the reason.
    """
    problem, answer = (_get_text(record, column) for column in ("problem", "answer"))
    images = [_read_image(image, f"image {i + 1}") for i, image in enumerate(record["images"] or [])]
    if not images:
        raise ValueError("no image")
    if (tags := problem.count(TAG)) != len(images):
        raise ValueError(f"{tags} {TAG} tags in the problem for {len(images)} images")
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": f"{problem} {INSTRUCTION}"}],
        "images": images,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"split": split, "index": index, "answer": answer, "question": problem},
    }


def _get_text(record: dict[str, Any], column: str) -> str:
    text = record[column]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"no {column}")
    return text


def _read_image(image: dict[str, Any] | None, which: str) -> dict[str, Any]:
    path = (image or {}).get("path")
    data = (image or {}).get("bytes")
    if data is None and path:
        try:
            data = Path(path).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise ValueError(f"{which}: {path} cannot be read") from error
    if not data:
        raise ValueError(f"{which} is empty")
    try:
        open_image(data, max_pixels=2**62)
    except SDPOError as error:
        raise ValueError(f"{which} is {error}") from error
    return {"bytes": data, "path": os.path.basename(path) if path else None}


def _write(rows: Any, split: str, file: Path, progress: ProgressCallback) -> int:
    import pyarrow.parquet as pq

    written, skipped = 0, 0
    batch: list[dict[str, Any]] = []
    schema = _build_schema()

    def flush() -> None:
        import pyarrow as pa

        nonlocal written
        writer.write_table(pa.Table.from_pylist(batch, schema=schema))
        written += len(batch)
        batch.clear()

    with pq.ParquetWriter(file, schema) as writer:
        for index, record in enumerate(_iterate(rows, split)):
            try:
                batch.append(build_row(record, split, index))
            except ValueError as error:
                logger.warning(f"{split} row {index}: {error}; skipped")
                skipped += 1
            if len(batch) == BATCH_ROWS:
                flush()
            progress.on_progress(f"reading {split}", index + 1, len(rows))
        flush()
    if not written:
        raise DataError(f"split {split!r}: no row of {len(rows)} can be used; name another data set with --source")
    logger.info(f"{split}: {written} rows" + (f", {skipped} skipped" if skipped else ""))
    return written


def _iterate(rows: Any, split: str) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowException

    try:
        # Arrow tables contain the images' bytes; a cast to undecoded images would copy the source.
        for table in rows.with_format("arrow").iter(BATCH_ROWS):
            yield from table.to_pylist()
    except (ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"split {split!r} is damaged ({reason}); create it again or name another --source") from error


def _build_schema() -> Any:
    """The schema as ``datasets`` writes it, so that ``datasets`` decodes the images."""
    from datasets import Features, Image, Sequence, Value

    text = Value("string")
    return Features(
        {
            "data_source": text,
            "prompt": [{"role": text, "content": text}],
            "images": Sequence(Image()),
            "ability": text,
            "reward_model": {"style": text, "ground_truth": text},
            "extra_info": {"split": text, "index": Value("int64"), "answer": text, "question": text},
        }
    ).arrow_schema


def _load(source: str) -> dict[str, Any]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DataError(f"Geometry3k's data needs {error.name}; install it: pip install 'sdpo[geo3k]'") from error
    import pyarrow as pa

    folder = os.path.expanduser(source)
    is_local = os.path.isdir(folder)
    if not is_local and (os.path.exists(folder) or source.startswith(("/", ".", "~")) or source.count("/") > 1):
        raise DataError(f"--source {source}: no such folder; it must hold parquet files named by split")
    is_saved = any(os.path.isfile(os.path.join(folder, name)) for name in ("dataset_dict.json", "state.json"))
    try:
        with _quiet_datasets():
            if is_saved:
                splits = datasets.load_from_disk(folder)
            else:
                splits = datasets.load_dataset(folder if is_local else source)
    except Exception as error:  # errors of datasets, of the hub's client and of its HTTP library share no base class
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        advice = "name another --source" if is_local else "without a connection, name a local copy"
        raise DataError(f"--source {source}: cannot be loaded ({reason}); {advice}") from error
    if not isinstance(splits, datasets.DatasetDict):
        raise DataError(f"--source {source}: is a single split; it must have {' and '.join(SPLITS)}")
    for split in SPLITS:
        if split not in splits:
            raise DataError(f"--source {source}: has no split {split!r}, only {', '.join(map(str, splits))}")
        missing = [column for column in COLUMNS if column not in splits[split].column_names]
        if missing:
            has = ", ".join(splits[split].column_names)
            raise DataError(f"--source {source}: split {split!r} has no column {missing[0]!r}, only {has}")
        stored = splits[split].features.arrow_schema.field("images").type
        if stored != pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})):
            raise DataError(f"--source {source}: column 'images' of split {split!r} is {stored}, not a list of images")
    return {split: splits[split].select_columns(list(COLUMNS)) for split in SPLITS}


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Disable the progress bars of ``datasets``, which disturb the console's, and its log."""
    import datasets

    had_bars, verbosity = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if had_bars:
            datasets.enable_progress_bars()
