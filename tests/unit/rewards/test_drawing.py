"""Drawn figures and the problems made of them: labels are where they belong, and answers follow from the labels."""

from __future__ import annotations

import io
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sdpo import cli
from sdpo.rewards.geo3k.reward import Geo3k
from sdpo.rewards.rows import load_rows
from sdpo.rewards.toy.drawing import Picture, draw_circle, draw_polygon, write_rows
from sdpo.rewards.toy.synthetic_geometry import (
    INSTRUCTION,
    Problem,
    draw_geometry_rows,
    draw_problems,
    format_fraction,
    format_root,
    write_drawn_geometry,
)

SQUARE = ((40.0, 40.0), (100.0, 40.0), (100.0, 100.0), (40.0, 100.0))
KINDS = 12


def darkness(picture: Picture) -> Any:
    """Ink [rows, columns] in [0, 1]."""
    return 1 - np.asarray(Image.open(io.BytesIO(picture.png)).convert("L"), dtype=float) / 255


def ink_box(drawn: Any) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(drawn > 0.3)
    return columns.min(), rows.min(), columns.max(), rows.max()


# --- pictures


def test_image_is_a_png_of_the_requested_size() -> None:
    picture = draw_polygon(SQUARE, size=(140, 120))
    image = Image.open(io.BytesIO(picture.png))
    assert (image.format, image.size, image.mode) == ("PNG", (140, 120), "RGB")
    assert ink_box(darkness(picture)) == (40, 40, 100, 100)
    assert picture.to_cell() == {"bytes": picture.png, "path": None}


@pytest.mark.parametrize(
    ("side", "box"),
    [(0, (60, 20, 80, 39)), (1, (101, 60, 120, 80)), (2, (60, 101, 80, 120)), (3, (20, 60, 39, 80))],
)
def test_label_of_a_side_is_outside_of_its_middle(side: int, box: tuple[int, int, int, int]) -> None:
    labels = [None] * side + ["7"]
    picture = draw_polygon(SQUARE, sides=labels, size=(140, 140))
    added = darkness(picture) - darkness(draw_polygon(SQUARE, size=(140, 140)))
    left, top, right, bottom = ink_box(added)
    assert box[0] <= left <= right <= box[2] and box[1] <= top <= bottom <= box[3]
    assert picture.labels == {f"side {side}": "7"}


def test_label_position_does_not_depend_on_the_direction() -> None:
    there, back = draw_polygon(SQUARE, sides=["7"]), draw_polygon(SQUARE[1::-1] + SQUARE[:1:-1], sides=["7"])
    assert there.png == back.png


def test_label_of_an_angle_is_inside_its_corner() -> None:
    picture = draw_polygon(SQUARE, angles=[None, "A"], right_angles=[3], size=(140, 140))
    added = darkness(picture) - darkness(draw_polygon(SQUARE, size=(140, 140)))
    assert added[41:70, 70:100].max() > 0.5, "the label"
    assert added[93, 41:48].min() > 0.5 and added[93:99, 47].min() > 0.5, "the small square"
    assert added[41:70, :70].max() == 0
    assert picture.labels == {"angle 1": "A", "angle 3": "right"}


def test_label_is_inside_the_image() -> None:
    corners = ((1.0, 1.0), (111.0, 1.0), (111.0, 111.0))
    shifted = darkness(draw_polygon(corners, sides=["88"], size=(112, 112)))
    assert shifted[2:15, 40:70].max() > 0.5
    assert shifted.sum() > darkness(draw_polygon(corners, size=(112, 112))).sum() + 30


def test_circles() -> None:
    plain = darkness(draw_circle())
    assert ink_box(plain) == (8, 8, 103, 103), "radius 0.42 of 112 around 56, to whole pixels"
    radius, diameter = draw_circle(radius="5"), draw_circle(diameter="5")
    assert (radius.labels, diameter.labels) == ({"radius": "5"}, {"diameter": "5"})
    assert darkness(radius)[56, 60:100].min() > 0.5 > darkness(radius)[56, 12:52].max()
    assert darkness(diameter)[56, 12:100].min() > 0.5
    quarter = draw_circle(angle=(90, "90°"))
    assert quarter.labels == {"angle": "90°"}
    assert darkness(quarter)[12:56, 56].min() > 0.5, "90° is up"


# --- rows


def test_images_are_read_from_a_file(tmp_path: Path) -> None:
    first, second = draw_circle(radius="1"), draw_circle(radius="2")
    rows: list[dict[str, Any]] = [{"images": [first.to_cell(), second.to_cell()], "a": 1}, {"images": [], "a": 2}]
    write_rows(rows, tmp_path / "x.parquet")
    table = pq.read_table(tmp_path / "x.parquet")
    assert table.schema.field("images").type == pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    assert table.to_pylist() == rows


def test_rows_are_in_the_schema_of_verl_s_geometry3k(tmp_path: Path) -> None:
    rows = draw_geometry_rows(KINDS, seed=3, split="test")
    for index, row in enumerate(rows):
        assert list(row) == ["data_source", "prompt", "images", "ability", "reward_model", "extra_info"]
        assert (row["data_source"], row["ability"]) == ("hiyouga/geometry3k", "math")
        [message] = row["prompt"]
        answer, question = row["reward_model"]["ground_truth"], row["extra_info"]["question"]
        assert message == {"role": "user", "content": f"{question} {INSTRUCTION}"}
        assert message["content"].count("<image>") == len(row["images"])
        assert row["reward_model"] == {"style": "rule", "ground_truth": answer}
        assert row["extra_info"] == {"split": "test", "index": index, "answer": answer, "question": question}
        for cell in row["images"]:
            Image.open(io.BytesIO(cell["bytes"])).load()
    assert sorted({len(row["images"]) for row in rows}) == [0, 1, 2, 3]
    write_rows(rows, tmp_path / "x.parquet")
    assert len(load_rows([str(tmp_path / "x.parquet")], "x")) == KINDS


def test_equal_seeds_give_equal_rows() -> None:
    assert draw_geometry_rows(24, seed=1) == draw_geometry_rows(24, seed=1)
    assert draw_geometry_rows(24, seed=1) != draw_geometry_rows(24, seed=2)
    assert draw_geometry_rows(12, seed=1) == draw_geometry_rows(24, seed=1)[:12]


# --- answers


@pytest.mark.parametrize(
    ("square", "latex"),
    [
        (1, "1"),
        (2, "\\sqrt{2}"),
        (9, "3"),
        (12, "2\\sqrt{3}"),
        (50, "5\\sqrt{2}"),
        (72, "6\\sqrt{2}"),
        (30, "\\sqrt{30}"),
    ],
)
def test_roots(square: int, latex: str) -> None:
    assert format_root(square) == latex


def test_fractions() -> None:
    from fractions import Fraction

    assert [format_fraction(Fraction(*f)) for f in ((6, 8), (4, 2), (13, 2))] == ["\\frac{3}{4}", "2", "\\frac{13}{2}"]


def value(latex: str) -> float:
    """The number that an answer denotes."""
    if found := re.fullmatch(r"(\d*)\\sqrt\{(\d+)\}", latex):
        return int(found[1] or 1) * math.sqrt(int(found[2]))
    if found := re.fullmatch(r"\\frac\{(\d+)\}\{(\d+)\}", latex):
        return int(found[1]) / int(found[2])
    if found := re.fullmatch(r"(\d+)\\pi", latex):
        return int(found[1]) * math.pi
    return float(latex.removesuffix("^\\circ"))


def number(picture: Picture, label: str) -> float:
    return float(picture.labels[label].rstrip("°"))


def solve(problem: Problem) -> float:
    """Compute the answer from the drawing, independently of the construction of the problem."""
    first, *others = problem.pictures or (Picture(b""),)
    match problem.kind:
        case "hypotenuse":
            assert (first.labels["side 1"], first.labels["angle 0"]) == ("x", "right")
            return math.hypot(number(first, "side 0"), number(first, "side 2"))
        case "leg":
            assert (first.labels["side 0"], first.labels["angle 0"]) == ("x", "right")
            return number(first, "side 1") * math.sin(math.acos(number(first, "side 2") / number(first, "side 1")))
        case "tangent":
            assert (first.labels["angle 2"], first.labels["angle 0"]) == ("A", "right")
            return math.tan(math.atan2(number(first, "side 0"), number(first, "side 2")))
        case "triangle angle":
            assert first.labels["angle 1"] == "x°"
            return 180 - number(first, "angle 0") - number(first, "angle 2")
        case "quadrilateral angle":
            assert first.labels["angle 3"] == "A"
            return 360 - sum(number(first, f"angle {i}") for i in range(3))
        case "central angle":
            return 360 - number(first, "angle")
        case "circle area":
            return math.pi * number(first, "radius") ** 2
        case "circle radius":
            return number(first, "diameter") / 2
        case "rectangle area":
            return number(first, "side 0") * number(first, "side 1")
        case "similar triangles":
            assert others[0].labels["side 2"] == "x"
            return number(others[0], "side 0") / number(first, "side 0") * number(first, "side 2")
        case "three squares":
            return sum(number(picture, "side 1") ** 2 for picture in problem.pictures)
        case "text alone":
            a, b = map(int, re.findall(r"\d+", problem.question))
            return math.hypot(a, b)
    raise AssertionError(problem.kind)


def test_answers_match_the_drawing() -> None:
    problems = draw_problems(20 * KINDS, seed=0)
    assert len({problem.kind for problem in problems}) == KINDS
    for problem in problems:
        assert value(problem.answer) == pytest.approx(solve(problem)), problem


def test_all_kinds_of_answers_occur() -> None:
    answers = [problem.answer for problem in draw_problems(10 * KINDS, seed=0)]
    for part in ("\\sqrt", "\\frac", "\\pi", "\\circ"):
        assert any(part in answer for answer in answers)
    assert any(answer.isdigit() for answer in answers)


# --- as files


def test_reward_function_of_geometry3k_accepts_every_answer(tmp_path: Path) -> None:
    write_drawn_geometry(tmp_path, num_train=4 * KINDS, num_test=KINDS)
    rows = load_rows([str(tmp_path / "train.parquet"), str(tmp_path / "test.parquet")], "x")
    assert len(rows) == 5 * KINDS
    reward_manager = Geo3k()
    for row in rows:
        right = reward_manager.compute_score(row, f"<think>so</think>\\boxed{{{row.ground_truth}}}")
        wrong = reward_manager.compute_score(row, "<think>so</think>\\boxed{777}")
        assert (right.score, wrong.score) == (1.0, pytest.approx(0.1)), row.ground_truth


def test_files_are_not_overwritten(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["sdpo", "data", "geo3k", "--out", str(tmp_path), "--drawn", "4"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert len(load_rows([str(tmp_path / "test.parquet")], "x")) == 1
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: --out: {tmp_path}/train.parquet exists; name another folder\n"
