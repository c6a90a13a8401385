"""Positions of images in messages, and pixels of files of every mode and size."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdpo.errors import SDPOError
from sdpo.prompting.images import collect_images, format_content, open_image, place_images


def save(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "system", "content": "Short."}, {"role": "user", "content": content}]


# --- messages


def test_tags_become_parts_in_order() -> None:
    placed = place_images(user("a <image> b<image><image>"), [b"1", b"2", b"3"])
    assert placed[0] == {"role": "system", "content": "Short."}
    assert placed[1]["content"] == [
        {"type": "text", "text": "a "},
        {"type": "image", "image": b"1"},
        {"type": "text", "text": " b"},
        {"type": "image", "image": b"2"},
        {"type": "image", "image": b"3"},
    ]
    assert collect_images(placed) == (b"1", b"2", b"3")
    assert format_content(placed[1]["content"]) == "a <image> b<image><image>"


def test_tags_of_several_messages_share_the_images() -> None:
    first, second = ({"role": role, "content": "<image>"} for role in ("user", "assistant"))
    assert collect_images(place_images([first, second], [b"1", b"2"])) == (b"1", b"2")


def test_parts_get_images_and_the_row_is_not_modified() -> None:
    row = user([{"type": "image"}, {"type": "text", "text": "<image> is a tag"}])
    placed = place_images(row, [b"1"])
    assert placed[1]["content"] == [{"type": "image", "image": b"1"}, {"type": "text", "text": "<image> is a tag"}]
    assert row[1]["content"][0] == {"type": "image"}


def test_row_without_images_keeps_its_text() -> None:
    assert place_images(user("what does <image> mean?"), []) == user("what does <image> mean?")
    assert collect_images(user("<image>")) == ()
    assert format_content("plain") == "plain"


@pytest.mark.parametrize("num_tags", range(6))
@pytest.mark.parametrize("num_images", [1, 2, 3])
def test_numbers_of_tags_and_images_must_match(num_tags: int, num_images: int) -> None:
    images = [bytes([i]) for i in range(num_images)]
    if num_tags == num_images:
        assert collect_images(place_images(user("<image> " * num_tags), images)) == tuple(images)
        return
    with pytest.raises(SDPOError, match=rf"the prompt has {num_tags} <image> and the row has {num_images} images"):
        place_images(user("<image> " * num_tags), images)


# --- pixels

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def test_transparent_pixels_become_white() -> None:
    """A black drawing on a transparent background; ``convert`` alone would return black on black."""
    drawing = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    drawing.putpixel((1, 0), (0, 0, 0, 255))
    for image in (drawing, drawing.convert("LA")):
        opened = open_image(save(image), 100)
        assert [opened.getpixel((x, 0)) for x in (0, 1)] == [WHITE, (0, 0, 0)]
    half = open_image(save(Image.new("RGBA", (1, 1), (255, 0, 0, 128))), 100)
    assert np.allclose(half.getpixel((0, 0)), (255, 127, 127), atol=1)


def test_palette_with_and_without_a_transparent_colour() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((1, 0), 1)
    opened = open_image(save(palette), 100)
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [RED, BLUE]
    opened = open_image(save(palette, transparency=1), 100)
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [RED, WHITE]


@pytest.mark.parametrize("low", [0, 5000])
def test_sixteen_bit_grey_keeps_its_shades(low: int) -> None:
    """``convert`` alone clips values above 255."""
    values = np.linspace(low, 50_000, 8).round().astype(np.uint16)[None]
    opened = np.asarray(open_image(save(Image.fromarray(values)), 100))
    assert opened[0, :, 0].tolist() == [0, 36, 72, 109, 145, 182, 218, 255]
    flat = np.full((2, 2), 700, dtype=np.uint16)
    assert np.asarray(open_image(save(Image.fromarray(flat)), 100)).max() == 0


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "CMYK"), ("TIFF", "CMYK"), ("PNG", "1"), ("PNG", "L"), ("GIF", "P")]
)
def test_other_modes_keep_their_colour(kind: str, mode: str) -> None:
    for colour in (WHITE, (0, 0, 0)):
        opened = open_image(save(Image.new("RGB", (8, 8), colour).convert(mode), kind), 100)
        assert opened.mode == "RGB"
        assert np.allclose(np.asarray(opened), colour, atol=3)


def test_photograph_is_rotated_upright() -> None:
    image = Image.new("RGB", (20, 10), RED)
    image.paste(BLUE, (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    opened = open_image(save(image, "PNG", exif=exif), 1000)
    assert opened.size == (10, 20)
    assert (opened.getpixel((5, 2)), opened.getpixel((5, 17))) == (BLUE, RED)


@pytest.mark.parametrize(
    ("size", "max_pixels", "expected"),
    [
        ((40, 30), 1200, (40, 30)),
        ((40, 30), 1199, (39, 29)),
        ((40, 30), 300, (20, 15)),
        ((1, 1), 1, (1, 1)),
        ((400, 2), 4, (28, 1)),
        ((3000, 2000), 60_000, (300, 200)),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_max_pixels(size: tuple[int, int], max_pixels: int, expected: tuple[int, int], kind: str) -> None:
    assert open_image(save(Image.new("RGB", size), kind), max_pixels).size == expected


def test_downscaled_image_has_the_same_content() -> None:
    image = Image.new("RGB", (200, 100), RED)
    image.paste(BLUE, (0, 0, 100, 100))
    opened = open_image(save(image), 200)
    assert opened.size == (20, 10)
    assert (opened.getpixel((2, 5)), opened.getpixel((17, 5))) == (BLUE, RED)


@pytest.mark.parametrize("size", [(1, 201), (201, 1), (10_000, 49)])
def test_extreme_aspect_ratio_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(SDPOError, match=rf"an image of {size[0]} x {size[1]} pixels is too narrow; at most 200 to 1"):
        open_image(save(Image.new("L", size)), 10**6)


def test_decompression_bomb_is_refused_before_decoding() -> None:
    with pytest.raises(SDPOError, match=r"not a readable image \(Image size \(400000000 pixels\) exceeds limit"):
        open_image(save(Image.new("1", (20_000, 20_000))), 10**6)
