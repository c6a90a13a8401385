"""A small synthetic Geometry3k: drawn problems with known answers, in the same schema as the data set.

For trying a config without a connection, and for tests; the data set itself is far larger and harder.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from sdpo.errors import DataError
from sdpo.rewards.geo3k.data import DATA_SOURCE, INSTRUCTION
from sdpo.rewards.toy.drawing import Picture, Point, draw_circle, draw_polygon, write_rows


@dataclass(frozen=True)
class Problem:
    """A question with its answer.

    Attributes:
        kind: type of the problem, such as "hypotenuse".
        question: text with an ``<image>`` tag per picture.
        answer: LaTeX, such as ``35``, ``2\\sqrt{3}``, ``\\frac{3}{4}``, ``9\\pi`` or ``55^\\circ``.
        pictures: in the order of the tags; empty for a problem without picture.
    """

    kind: str
    question: str
    answer: str
    pictures: tuple[Picture, ...] = ()


def draw_problems(num: int, seed: int) -> list[Problem]:
    """Draw problems of all kinds in turn."""
    rng = random.Random(f"drawn geometry {seed}")
    makers = list(_MAKERS.items())
    problems = []
    for index in range(num):
        kind, make = makers[index % len(makers)]
        question, answer, pictures = make(rng)
        problems.append(Problem(kind, question, answer, tuple(pictures)))
    return problems


def write_drawn_geometry(out: Path, num_train: int, num_test: int, seed: int = 0) -> None:
    """Write ``train.parquet`` and ``test.parquet`` into ``out``.

    Raises:
        DataError: a file exists already, or the folder cannot be created.
    """
    files = {split: out / f"{split}.parquet" for split in ("train", "test")}
    for file in files.values():
        if file.exists():
            raise DataError(f"--out: {file} exists; name another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--out {out}: cannot be created ({error.strerror}); name another folder") from error
    for split, num, own_seed in (("train", num_train, 2 * seed), ("test", num_test, 2 * seed + 1)):
        partial = files[split].with_suffix(".partial")
        write_rows(draw_geometry_rows(num, own_seed, split), partial)
        partial.rename(files[split])


def draw_geometry_rows(num: int, seed: int, split: str = "train") -> list[dict[str, Any]]:
    """Build rows in the schema of verl's Geometry3k, for ``drawing.write_rows``."""
    return [
        {
            "data_source": DATA_SOURCE,
            "prompt": [{"role": "user", "content": f"{problem.question} {INSTRUCTION}"}],
            "images": [picture.to_cell() for picture in problem.pictures],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": problem.answer},
            "extra_info": {"split": split, "index": index, "answer": problem.answer, "question": problem.question},
        }
        for index, problem in enumerate(draw_problems(num, seed))
    ]


def format_root(square: int) -> str:
    """Format the root of an integer as LaTeX in lowest terms: 9 gives ``3``, 12 gives ``2\\sqrt{3}``."""
    factor = max(f for f in range(1, math.isqrt(square) + 1) if square % (f * f) == 0)
    rest = square // (factor * factor)
    if rest == 1:
        return str(factor)
    return f"{factor if factor > 1 else ''}\\sqrt{{{rest}}}"


def format_fraction(value: Fraction) -> str:
    """Format a positive fraction as LaTeX in lowest terms: 6/8 gives ``\\frac{3}{4}``, 4/2 gives ``2``."""
    if value.denominator == 1:
        return str(value.numerator)
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


_Made = tuple[str, str, Sequence[Picture]]
_RIGHT_TRIANGLE: tuple[Point, ...] = ((32, 88), (32, 22), (110, 88))  # the right angle first
_RECTANGLE: tuple[Point, ...] = ((32, 28), (110, 28), (110, 84), (32, 84))


def _hypotenuse(rng: random.Random) -> _Made:
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    return "<image>Find x.", format_root(a * a + b * b), [_right_triangle(str(a), "x", str(b))]


def _leg(rng: random.Random) -> _Made:
    leg = rng.randint(2, 9)
    hypotenuse = leg + rng.randint(1, 9)
    picture = _right_triangle("x", str(hypotenuse), str(leg))
    return "<image>Find x.", format_root(hypotenuse**2 - leg**2), [picture]


def _tangent(rng: random.Random) -> _Made:
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    picture = draw_polygon(_RIGHT_TRIANGLE, sides=[str(a), None, str(b)], angles=[None, None, "A"], right_angles=[0])
    return "<image>Find tan A.", format_fraction(Fraction(a, b)), [picture]


def _triangle_angle(rng: random.Random) -> _Made:
    first, second = rng.randint(35, 70), rng.randint(35, 70)
    picture = draw_polygon(_jitter(((14, 92), (72, 12), (128, 92)), rng), angles=[f"{first}°", "x°", f"{second}°"])
    return "<image>Find x.", str(180 - first - second), [picture]


def _quadrilateral_angle(rng: random.Random) -> _Made:
    angles = [rng.randint(70, 105) for _ in range(3)]
    picture = draw_polygon(
        _jitter(((16, 16), (124, 16), (124, 96), (16, 96)), rng), angles=[f"{angle}°" for angle in angles] + ["A"]
    )
    return "<image>Find the measure of angle A.", f"{360 - sum(angles)}^\\circ", [picture]


def _central_angle(rng: random.Random) -> _Made:
    angle = rng.randint(50, 150)
    return (
        "<image>Find the measure of the major arc.",
        f"{360 - angle}^\\circ",
        [draw_circle(angle=(angle, f"{angle}°"))],
    )


def _circle_area(rng: random.Random) -> _Made:
    radius = rng.randint(2, 12)
    return "<image>Find the area of the circle, in terms of π.", f"{radius**2}\\pi", [draw_circle(radius=str(radius))]


def _circle_radius(rng: random.Random) -> _Made:
    diameter = rng.randint(3, 25)
    answer = format_fraction(Fraction(diameter, 2))
    return "<image>Find the radius of the circle.", answer, [draw_circle(diameter=str(diameter))]


def _rectangle_area(rng: random.Random) -> _Made:
    width, height = rng.randint(2, 12), rng.randint(2, 12)
    picture = draw_polygon(_RECTANGLE, sides=[str(width), str(height)], right_angles=[0, 1, 2, 3])
    return "<image>Find the area of the rectangle.", str(width * height), [picture]


def _similar_triangles(rng: random.Random) -> _Made:
    a, b, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9)
    pictures = [_right_triangle(str(a), None, str(b)), _right_triangle(str(c), None, "x")]
    return "<image><image>The two triangles are similar. Find x.", format_fraction(Fraction(b * c, a)), pictures


def _three_squares(rng: random.Random) -> _Made:
    sides = [rng.randint(2, 9) for _ in range(3)]
    square = ((36, 16), (112, 16), (112, 92), (36, 92))
    pictures = [draw_polygon(square, sides=[None, str(side)], right_angles=[0, 1, 2, 3]) for side in sides]
    question = "A first square: <image> A second: <image> A third: <image> Find the sum of their areas."
    return question, str(sum(side**2 for side in sides)), pictures


def _text_alone(rng: random.Random) -> _Made:
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    question = f"The legs of a right triangle measure {a} and {b}. Find the length of its hypotenuse."
    return question, format_root(a * a + b * b), []


_MAKERS: dict[str, Callable[[random.Random], _Made]] = {
    "hypotenuse": _hypotenuse,
    "leg": _leg,
    "tangent": _tangent,
    "triangle angle": _triangle_angle,
    "quadrilateral angle": _quadrilateral_angle,
    "central angle": _central_angle,
    "circle area": _circle_area,
    "circle radius": _circle_radius,
    "rectangle area": _rectangle_area,
    "similar triangles": _similar_triangles,
    "three squares": _three_squares,
    "text alone": _text_alone,
}


def _right_triangle(left: str | None, hypotenuse: str | None, bottom: str | None) -> Picture:
    return draw_polygon(_RIGHT_TRIANGLE, sides=[left, hypotenuse, bottom], right_angles=[0])


def _jitter(corners: Sequence[Point], rng: random.Random) -> list[Point]:
    return [(x + rng.uniform(-4, 4), y + rng.uniform(-4, 4)) for x, y in corners]
