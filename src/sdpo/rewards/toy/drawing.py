"""Labelled geometric figures as PNG pictures, and rows with pictures as parquet files in verl's schema."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import pyarrow as pa

Point: TypeAlias = tuple[float, float]  # pixels from the upper left corner: to the right, down


@dataclass(frozen=True)
class Picture:
    """A drawn figure.

    Attributes:
        png: the file's bytes.
        labels: what is written where, such as ``{"side 0": "5", "angle 2": "40°"}``; side i runs from corner i to the
            next one.
    """

    png: bytes
    labels: Mapping[str, str] = field(default_factory=dict)

    def to_cell(self) -> dict[str, bytes | None]:
        """The picture as an element of the column ``images``."""
        return {"bytes": self.png, "path": None}


def draw_polygon(
    corners: Sequence[Point],
    *,
    sides: Sequence[str | None] = (),
    angles: Sequence[str | None] = (),
    right_angles: Sequence[int] = (),
    size: tuple[int, int] = (140, 112),
    font_size: int = 16,
) -> Picture:
    """A convex polygon with labels outside its sides' middles and inside its corners.

    Args:
        corners: at least three, in order around the polygon.
        sides: side i's label, between corner i and the next; none where it is None or the sequence has ended.
        angles: corner i's label, likewise.
        right_angles: corners that are marked with a small square.
        size: width and height in pixels.
        font_size: in pixels.
    """
    canvas = _Canvas(size, font_size)
    centre = (sum(x for x, _ in corners) / len(corners), sum(y for _, y in corners) / len(corners))
    following = [*corners[1:], corners[0]]
    canvas.line([*corners, corners[0]])
    labels: dict[str, str] = {}
    for i, text in enumerate(sides):
        if text is not None:
            middle = _between(corners[i], following[i], 0.5)
            canvas.write(text, _outside(corners[i], following[i], middle, centre, 0.7 * font_size))
            labels[f"side {i}"] = text
    for i, text in enumerate(angles):
        if text is not None:
            canvas.write(text, _towards(corners[i], centre, 1.7 * font_size))
            labels[f"angle {i}"] = text
    for i in right_angles:
        before, after = (_towards(corners[i], other, 7) for other in (corners[i - 1], following[i]))
        canvas.line([before, (before[0] + after[0] - corners[i][0], before[1] + after[1] - corners[i][1]), after])
        labels[f"angle {i}"] = "right"
    return Picture(canvas.to_png(), labels)


def draw_circle(
    *,
    radius: str | None = None,
    diameter: str | None = None,
    angle: tuple[float, str] | None = None,
    size: tuple[int, int] = (112, 112),
    font_size: int = 16,
) -> Picture:
    """A circle with a labelled radius or diameter, or with a labelled central angle.

    Args:
        radius, diameter: the label of the one that is drawn, horizontally.
        angle: degrees in (0, 360) from the radius that points right, anticlockwise, and the label between the radii.
        size: width and height in pixels.
        font_size: in pixels.
    """
    canvas = _Canvas(size, font_size)
    centre, length = (size[0] / 2, size[1] / 2), 0.42 * min(size)
    right = (centre[0] + length, centre[1])
    canvas.circle(centre, length)
    labels = {name: text for name, text in (("radius", radius), ("diameter", diameter)) if text is not None}
    if radius is not None:
        canvas.line([centre, right])
        canvas.write(radius, (centre[0] + length / 2, centre[1] - 0.6 * font_size))
    if diameter is not None:
        canvas.line([(centre[0] - length, centre[1]), right])
        canvas.write(diameter, (centre[0], centre[1] - 0.6 * font_size))
    if angle is not None:
        degrees, text = angle
        canvas.line([right, centre, _on_circle(centre, length, degrees)])
        canvas.write(text, _on_circle(centre, 0.6 * length, degrees / 2))
        labels["angle"] = text
    return Picture(canvas.to_png(), labels)


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows whose column ``images`` is a list of cells (``Picture.to_cell``), empty in a row of text alone."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(list(rows))
    # Inferred, the type of `path` would be null, which readers do not agree on.
    images = pa.array([row["images"] for row in rows], type=_images_type())
    pq.write_table(table.set_column(table.column_names.index("images"), "images", images), path)


def _images_type() -> pa.DataType:
    import pyarrow as pa

    return pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


class _Canvas:
    """White paper and a black pen."""

    def __init__(self, size: tuple[int, int], font_size: int) -> None:
        from PIL import Image, ImageDraw, ImageFont

        self._image = Image.new("RGB", size, "white")
        self._pen = ImageDraw.Draw(self._image)
        self._font = ImageFont.load_default(size=font_size)

    def line(self, points: Sequence[Point]) -> None:
        self._pen.line(list(points), fill="black")

    def circle(self, centre: Point, radius: float) -> None:
        (x, y), r = centre, radius
        self._pen.ellipse([x - r, y - r, x + r, y + r], outline="black")

    def write(self, text: str, at: Point) -> None:
        """Text centred at a point, moved as far as needed to stay on the paper."""
        left, top, right, bottom = self._pen.textbbox(at, text, font=self._font, anchor="mm")
        width, height = self._image.size
        x = at[0] + max(0, 1 - left) - max(0, right - width + 1)
        y = at[1] + max(0, 1 - top) - max(0, bottom - height + 1)
        self._pen.text((x, y), text, font=self._font, fill="black", anchor="mm")

    def to_png(self) -> bytes:
        buffer = io.BytesIO()
        self._image.save(buffer, "PNG")
        return buffer.getvalue()


def _between(a: Point, b: Point, share: float) -> Point:
    return (a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1]))


def _towards(a: Point, b: Point, distance: float) -> Point:
    return _between(a, b, distance / math.dist(a, b))


def _outside(a: Point, b: Point, start: Point, inside: Point, distance: float) -> Point:
    """From a point of the line ab, so far at right angles to it and away from ``inside``."""
    across = ((b[1] - a[1]) / math.dist(a, b), (a[0] - b[0]) / math.dist(a, b))
    if across[0] * (inside[0] - start[0]) + across[1] * (inside[1] - start[1]) > 0:
        across = (-across[0], -across[1])
    return (start[0] + distance * across[0], start[1] + distance * across[1])


def _on_circle(centre: Point, radius: float, degrees: float) -> Point:
    angle = math.radians(degrees)
    return (centre[0] + radius * math.cos(angle), centre[1] - radius * math.sin(angle))
