"""Draw labelled geometric figures as PNG, and write rows with images as parquet files in verl's schema."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import pyarrow as pa

Point: TypeAlias = tuple[float, float]  # pixels from the upper left corner, right and down


@dataclass(frozen=True)
class Picture:
    """A drawn figure.

    Attributes:
        png: content of the PNG file.
        labels: text by position, such as ``{"side 0": "5", "angle 2": "40°"}``; side i is between corners i and i + 1.
    """

    png: bytes
    labels: Mapping[str, str] = field(default_factory=dict)

    def to_cell(self) -> dict[str, bytes | None]:
        """Convert to an element of the column ``images``."""
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
    """Draw a convex polygon with labels outside the middle of its sides and inside its corners.

    Args:
        corners: at least three, in order around the polygon.
        sides: label of side i, between corners i and i + 1; None for no label, also for missing items.
        angles: label of corner i, likewise.
        right_angles: corners to mark with a small square.
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
    """Draw a circle with a labelled radius or diameter, or with a labelled central angle.

    Args:
        radius, diameter: label of the horizontal line to draw.
        angle: degrees in (0, 360), anticlockwise from the radius to the right, and the label between the radii.
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
    """Write rows with lists of cells (``Picture.to_cell``) in the column ``images``; a list may be empty."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(list(rows))
    # The inferred type of `path` would be null, which not all readers accept.
    images = pa.array([row["images"] for row in rows], type=_images_type())
    pq.write_table(table.set_column(table.column_names.index("images"), "images", images), path)


def _images_type() -> pa.DataType:
    import pyarrow as pa

    return pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


class _Canvas:
    """White image with a black pen."""

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
        """Write text centred at a point, shifted to stay inside the image."""
        left, top, right, bottom = self._pen.textbbox(at, text, font=self._font, anchor="mm")
        width, height = self._image.size
        x = at[0] + max(0, 1 - left) - max(0, right - width + 1)
        y = at[1] + max(0, 1 - top) - max(0, bottom - height + 1)
        self._pen.text((x, y), text, font=self._font, fill="black", anchor="mm")

    def to_png(self) -> bytes:
        buffer = io.BytesIO()
        self._image.save(buffer, "PNG")
        return buffer.getvalue()


def _between(a: Point, b: Point, fraction: float) -> Point:
    return (a[0] + fraction * (b[0] - a[0]), a[1] + fraction * (b[1] - a[1]))


def _towards(a: Point, b: Point, distance: float) -> Point:
    return _between(a, b, distance / math.dist(a, b))


def _outside(a: Point, b: Point, start: Point, inside: Point, distance: float) -> Point:
    """The point at a distance from ``start`` on the line ab, perpendicular to it and away from ``inside``."""
    across = ((b[1] - a[1]) / math.dist(a, b), (a[0] - b[0]) / math.dist(a, b))
    if across[0] * (inside[0] - start[0]) + across[1] * (inside[1] - start[1]) > 0:
        across = (-across[0], -across[1])
    return (start[0] + distance * across[0], start[1] + distance * across[1])


def _on_circle(centre: Point, radius: float, degrees: float) -> Point:
    angle = math.radians(degrees)
    return (centre[0] + radius * math.cos(angle), centre[1] - radius * math.sin(angle))
