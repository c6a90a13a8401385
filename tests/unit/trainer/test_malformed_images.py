"""Malformed and unusual image files in a run: the run reads, rejects in one line, or skips and counts them."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from vision_language import make_image

from sdpo.config.data import DataConfig
from sdpo.config.model import ModelConfig
from sdpo.config.root import SDPOConfig
from sdpo.errors import SDPOError
from sdpo.models.multimodal.processor import MultimodalProcessor, load_reader
from sdpo.observability.progress import NullCallback
from sdpo.trainer.data.prompts import Prompt, load_prompts

MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "LAB"]
SIZES = [(1, 1), (1, 2), (2, 1), (3, 500), (199, 1), (200, 1), (27, 29), (640, 480)]
TOO_NARROW = [(1, 201), (10_000, 1), (1, 10_000), (10_000, 40)]


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def cases() -> Iterator[tuple[str, bytes, bool | None]]:
    """Name, file content, and whether it must be readable; None if both results are correct."""
    good = {
        kind: save(Image.open(BytesIO(make_image(0))), kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")
    }
    for kind, data in good.items():
        yield f"complete {kind}", data, True
        for fraction in (0.02, 0.2, 0.5, 0.9):
            yield (
                f"{kind} truncated at {fraction}",
                data[: int(len(data) * fraction)],
                False if fraction < 0.6 else None,
            )
        rng = random.Random(kind)
        for number in range(8):
            changed = bytearray(data)
            for _ in range(number + 1):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            yield f"{kind} with {number + 1} bytes changed", bytes(changed), None
    for mode in MODES:
        kind = "TIFF" if mode in ("CMYK", "I", "F", "LAB") else "PNG"
        yield f"mode {mode}", save(Image.new(mode, (60, 60)), kind), True
    for size in SIZES:
        yield f"{size[0]} x {size[1]}", save(Image.new("RGB", size), "PNG"), True
    for size in TOO_NARROW:
        yield f"{size[0]} x {size[1]}", save(Image.new("L", size), "PNG"), False
    yield "10,000 x 10,000 JPEG", save(Image.new("L", (10_000, 10_000)), "JPEG"), True
    yield "20,000 x 20,000", save(Image.new("1", (20_000, 20_000)), "PNG"), False
    texts = [b"", b"\0", b"\0" * 5000, b"<image>", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"%PDF-1.4", b"<svg></svg>"]
    for data in [*texts, random.Random(0).randbytes(4000)]:
        yield f"no image: {data[:8]!r}", data, False


CASES = list(cases())
assert len(CASES) >= 100


@pytest.fixture(scope="module")
def reader(vision_dir: Callable[[str], Path]) -> MultimodalProcessor:
    loaded = load_reader(ModelConfig(path=str(vision_dir("qwen2_5_vl"))), 10**6)
    assert loaded is not None
    return loaded


def write(path: Path, files: list[bytes]) -> str:
    prompt = [{"role": "user", "content": "<image>how long?"}]
    rows = [
        {
            "data_source": "x",
            "prompt": prompt,
            "reward_model": {"ground_truth": "1"},
            "images": [{"bytes": data, "path": None}],
        }
        for data in files
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def load(file: str, reader: MultimodalProcessor, config: DataConfig) -> list[Prompt]:
    return load_prompts([file], "data.train_files", config, reader, NullCallback(), window=None, max_response_length=8)


@pytest.mark.parametrize(("name", "data", "readable"), CASES, ids=[name for name, _, _ in CASES])
def test_image_is_read_or_rejected_in_one_line(
    reader: MultimodalProcessor,
    make_run: Callable[..., SDPOConfig],
    tmp_path: Path,
    name: str,
    data: bytes,
    readable: bool | None,
) -> None:
    file = write(tmp_path / "rows.parquet", [make_image(1), data])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            prompts = load(file, reader, make_run().data)
    except SDPOError as error:
        assert not readable, error
        assert str(error).startswith(f"data.train_files: {file}: row 1: ")
        assert str(error).endswith("; set data.filter_unreadable_images=true to skip such rows")
        assert "\n" not in str(error)
        assert "0x" not in str(error), "the message must not contain an object's address"
        return
    assert readable is not False
    assert len(prompts) == 2
    assert all(value.isfinite().all() for value in reader.read_pixels(data).values())


def test_unreadable_rows_are_skipped_and_counted(
    reader: MultimodalProcessor,
    make_run: Callable[..., SDPOConfig],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    decided = [(data, readable) for _, data, readable in CASES if readable is not None]
    num_bad = sum(not readable for _, readable in decided)
    file = write(tmp_path / "rows.parquet", [data for data, _ in decided])
    run = make_run(data__filter_unreadable_images=True)
    prompts = load(file, reader, run.data)
    assert [p.images[0] for p in prompts] == [data for data, readable in decided if readable]
    [message] = caplog.messages
    assert message.startswith(f"data.train_files: skipped {num_bad} of {len(decided)} rows; the first: ")
