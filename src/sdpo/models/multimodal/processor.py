"""Processors of vision-language models: convert messages to token ids and image files to pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from io import BytesIO
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from sdpo.config.model import ModelConfig
from sdpo.errors import DataError, SDPOError
from sdpo.models.loading import reads_images
from sdpo.prompting.control_tokens import CUT, encode_pieces
from sdpo.prompting.images import collect_images, open_image

INVISIBLE = "\u2060"  # a word joiner
CACHED_IMAGES = 64  # about one step's images; an image of a million pixels takes 15 MB


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt as token ids, with the image files of its image tokens, in order."""

    token_ids: Sequence[int]
    images: tuple[bytes, ...] = ()


def load_processor(path: str, **options: Any) -> ProcessorMixin:
    """Load a model's processor; without torchvision, load it without video support, which requires torchvision."""
    try:
        return AutoProcessor.from_pretrained(path, **options)
    except ImportError:
        return load_without_videos(path, **options)


def load_without_videos(path: str, **options: Any) -> ProcessorMixin:
    """Load a processor of the same class name without its video processor."""
    architecture = AutoConfig.from_pretrained(path, **options)
    return _leave_out_videos(PROCESSOR_MAPPING[type(architecture)]).from_pretrained(path, **options)


def _leave_out_videos(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    class WithoutVideos(kind):  # type: ignore[misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in kind.get_attributes() if name != "video_processor"]

        def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any:
            files = super().save_pretrained(save_directory, **kwargs)
            # With torchvision, a processor with videos reads the video settings from this file.
            self.image_processor.save_pretrained(save_directory)
            return files

    WithoutVideos.__name__ = WithoutVideos.__qualname__ = kind.__name__  # transformers saves and looks up this name
    return WithoutVideos


class MultimodalProcessor:
    """A processor as the tokenizer of ``prompting/tokenization.py``, and as the source of pixels.

    It returns the processor's token ids for a chat, but prepares an image once for all prompts that contain it. Content
    parts of type image hold the image file as bytes.

    Most processors replace an image with special tokens only. Tokenizers never merge text across special tokens, so
    these image tokens are the same in every prompt and are inserted without the processor. Other processors run for
    every prompt.

    Args:
        processor: of the model.
        max_pixels: larger images are downscaled first.
    """

    encodes_pieces = True  # between cuts, see prompting/control_tokens.py

    def __init__(self, processor: ProcessorMixin, max_pixels: int) -> None:
        self.processor = processor
        self.tokenizer: PreTrainedTokenizerBase = processor.tokenizer
        self.max_pixels = max_pixels
        self.chat_template: Any = getattr(processor, "chat_template", None) or self.tokenizer.chat_template
        self.image_token = getattr(processor, "image_token", None)
        self._open = lru_cache(CACHED_IMAGES)(lambda data: open_image(data, self.max_pixels))
        self._read = lru_cache(CACHED_IMAGES)(self._read_file)
        # Token ids and grids are small, so they are cached for every image; this avoids preparing images again.
        self._measure = lru_cache(None)(self._measure_file)

    @cached_property
    def _has_fixed_tokens(self) -> bool:
        """Whether the processor replaces an image with special tokens only."""
        from PIL import Image

        if self.image_token is None:
            return False
        try:
            token_ids = self._process(self.image_token, [Image.new("RGB", (56, 56))])["input_ids"][0].tolist()
        except SDPOError:  # the processor marks images by another token
            return False
        return set(token_ids) <= set(self.tokenizer.added_tokens_decoder)

    def __call__(self, text: Any, **kwargs: Any) -> Any:
        return self.tokenizer(text, **kwargs)

    def decode(self, token_ids: Any, **kwargs: Any) -> Any:
        return self.tokenizer.decode(token_ids, **kwargs)

    def apply_chat_template(
        self,
        conversation: Any,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = False,
        **settings: Any,
    ) -> Any:
        """Token ids of a chat, with one image token per image feature.

        ``settings`` are passed to the chat template; ``tokenize`` and ``return_dict`` support only their defaults.

        Raises:
            DataError: an image cannot be read, or the text itself contains image tokens.
        """
        text = self._render(conversation, add_generation_prompt, **settings)
        images = collect_images(conversation)
        if images and not self._has_fixed_tokens:
            text = text.replace(CUT, INVISIBLE)  # this processor reads complete texts only
            return self._process(text, [self._open(image) for image in images])["input_ids"][0].tolist()
        token_ids = encode_pieces(self.tokenizer, text, add_special_tokens=self._lacks_bos(text))
        # -1 is no token.
        placeholder: Any = -1 if self.image_token is None else self.tokenizer.convert_tokens_to_ids(self.image_token)
        if token_ids.count(placeholder) != len(images):
            raise DataError(
                f"a prompt with {len(images)} images has {token_ids.count(placeholder)} {self.image_token}: its text "
                "must not contain that token, and the chat template must write it once for each image"
            )
        remaining = iter(images)
        expanded: list[int] = []
        for token_id in token_ids:
            expanded.extend(self._measure(next(remaining))[0] if token_id == placeholder else (token_id,))
        return expanded

    def read_pixels(self, image: bytes) -> Mapping[str, Tensor]:
        """Inputs of the model's vision tower for one image, by argument name.

        Raises:
            DataError: the image cannot be read.
        """
        return self._read(image)[1]

    def read_grid(self, image: bytes) -> Tensor:
        """[1, 3] number of patches of an image in time, height and width, for multimodal rotary positions.

        Raises:
            DataError: the image cannot be read.
        """
        grid = self._measure(image)[1]
        assert grid is not None, "the processor returns no image_grid_thw"
        return grid

    def _measure_file(self, data: bytes) -> tuple[tuple[int, ...], Tensor | None]:
        token_ids, pixels = self._read(data)
        return token_ids, pixels.get("image_grid_thw")

    def _read_file(self, data: bytes) -> tuple[tuple[int, ...], dict[str, Tensor]]:
        """An image's token ids, meaningful if they are fixed, and its pixels."""
        alone = [{"role": "user", "content": [{"type": "image"}]}]
        text = str(self.image_token) if self._has_fixed_tokens else self._render(alone, False)
        made = self._process(text, [self._open(data)])
        token_ids = tuple(made.pop("input_ids")[0].tolist())
        return token_ids, {name: value for name, value in made.items() if name not in _ALONGSIDE_TOKENS}

    def _render(self, conversation: Sequence[Mapping[str, Any]], add_generation_prompt: bool, **settings: Any) -> str:
        return self.processor.apply_chat_template(
            [_without_payload(message) for message in conversation],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=self.chat_template,
            **settings,
        )

    def _lacks_bos(self, text: str) -> bool:
        return self.tokenizer.bos_token is None or not text.startswith(self.tokenizer.bos_token)

    def _process(self, text: str, images: list[Any]) -> dict[str, Any]:
        begin = self._lacks_bos(text) and text != self.image_token
        try:
            return dict(self.processor(text=[text], images=images, return_tensors="pt", add_special_tokens=begin))
        # Unsupported sizes or numbers of images; some processors raise StopIteration for a wrong number.
        except (ValueError, ZeroDivisionError, StopIteration) as error:
            sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
            reason = " ".join(str(error).split()) or "the prompt has another number of image tokens"
            raise DataError(f"images of {sizes} pixels cannot be prepared ({reason})") from error


_ALONGSIDE_TOKENS = ("attention_mask", "mm_token_type_ids", "token_type_ids")


def _without_payload(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if content is None:
        return dict(message)
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    return {**message, "content": [{"type": "image"} if part["type"] == "image" else part for part in content]}


def load_reader(config: ModelConfig, max_pixels: int) -> MultimodalProcessor | None:
    """Load the image reader of a vision-language model; None for a language model.

    Raises:
        DataError: the processor cannot be loaded.
    """
    if not reads_images(config):
        return None
    try:
        processor = load_processor(config.path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"model.path: {config.path}: its processor cannot be loaded ({reason:.200})") from error
    return MultimodalProcessor(processor, max_pixels)


def encode_png(image: Any) -> bytes:
    """Encode a PIL image losslessly as the bytes of a PNG file."""
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
