"""Place images in chat messages, and decode image files of any mode and size."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from sdpo.errors import DataError, SDPOError

if TYPE_CHECKING:
    from PIL.Image import Image

TAG = "<image>"
# Image processors reject narrower images.
MAX_ASPECT_RATIO = 200


def place_images(prompt: Sequence[Mapping[str, Any]], images: Sequence[bytes]) -> list[dict[str, Any]]:
    """Replace each ``<image>`` in chat messages by a content part ``{"type": "image", ...}``.

    In a row without images, texts stay unchanged, tags included, as in verl. If content is already in parts, its parts
    of type image get the images in order.

    Raises:
        DataError: the number of tags, or of parts of type image, differs from the number of images.
    """
    if not images and all(isinstance(message["content"], str | None) for message in prompt):
        return [dict(message) for message in prompt]
    remaining = list(images)
    num_tags = 0
    messages = []
    for message in prompt:
        content = message["content"]
        # A text without an image stays a string: some chat templates support only strings in system messages.
        if content is not None and (not isinstance(content, str) or (images and TAG in content)):
            parts = _split(content) if isinstance(content, str) else content
            content = []
            for part in parts:
                if part["type"] == "image":
                    num_tags += 1
                    part = {"type": "image", "image": remaining.pop(0) if remaining else b""}
                content.append(part)
        messages.append({**message, "content": content})
    if num_tags != len(images):
        raise DataError(f"the prompt has {num_tags} {TAG} and the row has {len(images)} images; use one tag per image")
    return messages


def _split(text: str) -> list[dict[str, Any]]:
    pieces = [piece for piece in re.split(f"({TAG})", text) if piece]
    return [{"type": "image"} if piece == TAG else {"type": "text", "text": piece} for piece in pieces]


def collect_images(messages: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
    """The images of all content parts of type image, in order."""
    return tuple(
        part["image"]
        for message in messages
        if not isinstance(message["content"], str | None)
        for part in message["content"]
        if part["type"] == "image"
    )


def format_content(content: Any) -> str:
    """Format a message's content as readable text, with a tag for each image."""
    if isinstance(content, str | None):
        return content or ""
    return "".join(TAG if part["type"] == "image" else part.get("text", "") for part in content)


def open_image(data: bytes, max_pixels: int) -> Image:
    """Decode an image file to RGB, downscaled to at most ``max_pixels`` with its aspect ratio.

    The EXIF orientation is applied; transparent pixels become white.

    Raises:
        DataError: the file is no image, is truncated, or is too narrow.
    """
    import warnings

    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # PIL raises an error at twice the number of pixels of this warning; other images are downscaled.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            file = Image.open(BytesIO(data))
            width, height = file.size
            if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                raise DataError(f"an image of {width} x {height} pixels is too narrow; at most {MAX_ASPECT_RATIO} to 1")
            file.draft(None, _fit(file.size, max_pixels))  # decode a JPEG at a lower resolution
            image = ImageOps.exif_transpose(_to_rgb(file))
    except SDPOError:
        raise
    except UnidentifiedImageError:
        raise DataError("not an image file that can be read") from None
    except Exception as error:  # decoders raise any exception for a broken file
        raise DataError(f"not a readable image ({' '.join(str(error).split()) or type(error).__name__})") from error
    return image.resize(_fit(image.size, max_pixels), Image.Resampling.BICUBIC, reducing_gap=2.0)


def _fit(size: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    """The size, or the largest size of the same aspect ratio with at most ``max_pixels``."""
    width, height = size
    scale = min(1.0, (max_pixels / (width * height)) ** 0.5)
    return max(1, int(width * scale)), max(1, int(height * scale))


def _to_rgb(image: Image) -> Image:
    from PIL import Image as images

    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N", "F"):
        image = _to_eight_bits(image)
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = images.new("RGBA", image.size, "white")
    return images.alpha_composite(white, image).convert("RGB")


def _to_eight_bits(image: Image) -> Image:
    """Scale grey values of more than 8 bits to the range 0 to 255, since ``convert`` would clip them."""
    import numpy as np
    from PIL import Image as images

    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    low, high = values.min(), values.max()
    return images.fromarray(((values - low) * (255 / max(high - low, 1e-6))).astype(np.uint8))
