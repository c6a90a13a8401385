"""Images in chat messages: which there are, and opening them, whatever their mode and size."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from sdpo.errors import DataError, SDPOError

if TYPE_CHECKING:
    from PIL.Image import Image

TAG = "<image>"
# Beyond this no image processor makes patches of it.
MAX_ASPECT_RATIO = 200


def place_images(prompt: Sequence[Mapping[str, Any]], images: Sequence[bytes]) -> list[dict[str, Any]]:
    """Chat messages with each ``<image>`` of their texts replaced by a content part ``{"type": "image", ...}``.

    The texts of a row without images are left as they are, tags included, as verl leaves them. Content that is in parts
    already gets its images in the order of the parts of type image.

    Raises:
        DataError: there are not as many tags, or parts of type image, as images.
    """
    if not images and all(isinstance(message["content"], str) for message in prompt):
        return [dict(message) for message in prompt]
    remaining = list(images)
    num_tags = 0
    messages = []
    for message in prompt:
        content = message["content"]
        # A text without an image stays a text: some chat templates know nothing else in system messages.
        if not isinstance(content, str) or (images and TAG in content):
            parts = _split(content) if isinstance(content, str) else content
            content = []
            for part in parts:
                if part["type"] == "image":
                    num_tags += 1
                    part = {"type": "image", "image": remaining.pop(0) if remaining else b""}
                content.append(part)
        messages.append({**message, "content": content})
    if num_tags != len(images):
        raise DataError(f"the prompt has {num_tags} {TAG} and the row has {len(images)} images")
    return messages


def _split(text: str) -> list[dict[str, Any]]:
    pieces = [piece for piece in re.split(f"({TAG})", text) if piece]
    return [{"type": "image"} if piece == TAG else {"type": "text", "text": piece} for piece in pieces]


def collect_images(messages: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
    """What the content parts of type image hold, in their order."""
    return tuple(
        part["image"]
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "image"
    )


def format_content(content: Any) -> str:
    """A message's content for a person to read: images as the tag that stands for them."""
    if isinstance(content, str):
        return content
    return "".join(TAG if part["type"] == "image" else part.get("text", "") for part in content)


def open_image(data: bytes, max_pixels: int) -> Image:
    """Decode an image file to RGB, made smaller to at most ``max_pixels`` with its proportions kept.

    Turned upright by its EXIF orientation; what is transparent becomes white, as on paper.

    Raises:
        DataError: the data is no image, cut off, or of a size that no model reads.
    """
    import warnings

    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # From twice that number of pixels on PIL refuses by itself; the others are made smaller.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            file = Image.open(BytesIO(data))
            width, height = file.size
            if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                raise DataError(f"an image of {width} x {height} pixels is too narrow; at most {MAX_ASPECT_RATIO} to 1")
            file.draft(None, _fit(file.size, max_pixels))  # a JPEG need not be decoded to more
            image = ImageOps.exif_transpose(_to_rgb(file))
    except SDPOError:
        raise
    except UnidentifiedImageError:
        raise DataError("not an image file that can be read") from None
    except Exception as error:  # decoders raise whatever a broken file makes them raise
        raise DataError(f"not a readable image ({' '.join(str(error).split()) or type(error).__name__})") from error
    return image.resize(_fit(image.size, max_pixels), Image.Resampling.BICUBIC, reducing_gap=2.0)


def _fit(size: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    """The size itself, or the largest one of the same proportions with at most ``max_pixels``."""
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
    """Grey values of more than 8 bits, spread from their lowest to their highest: ``convert`` would cut them off."""
    import numpy as np
    from PIL import Image as images

    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    low, high = values.min(), values.max()
    return images.fromarray(((values - low) * (255 / max(high - low, 1e-6))).astype(np.uint8))
