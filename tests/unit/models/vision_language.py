"""Tiny vision-language models with random weights, as folders in the Hugging Face format; torchvision is not needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from sdpo.config.model import ModelConfig
from sdpo.models.loading import load_model
from sdpo.models.multimodal.processor import MultimodalProcessor, TokenPrompt, encode_png, load_reader
from sdpo.models.multimodal.vision_tower import VisionAdapter
from sdpo.prompting.images import collect_images, open_image

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
SPECIAL += ["<|video_pad|>"]
PAD, STOP, VISION_START, VISION_END, IMAGE, VIDEO = 0, 2, 3, 4, 5, 6
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava", "gemma3")
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": STOP,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}


def build_vision_model(family: str, folder: Path, seed: int = 0) -> Path:
    """Write model, tokenizer and processor of ``family`` into ``folder``; an image of 56 x 56 is 4 tokens."""
    tokenizer = _build_tokenizer(family)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _build_model(family, len(tokenizer))
        # Sharp distributions that depend on all inputs, images included.
        with torch.no_grad():
            for name, param in model.named_parameters():
                if "norm" not in name and param.dim() > 1:
                    param.normal_(std=0.4 if "lm_head" in name else 0.25)
    model.save_pretrained(folder)
    if family == "llava":
        template = CHAT_TEMPLATE.replace("IMAGE", "<|image_pad|>")
        image_processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        LlavaProcessor(
            image_processor,
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            image_token="<|image_pad|>",
            chat_template=template,
        ).save_pretrained(folder)
    elif family == "gemma3":  # replaces an image by another token, with line breaks around its tokens
        template = CHAT_TEMPLATE.replace("IMAGE", "<start_of_image>")
        image_processor = Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
        Gemma3Processor(image_processor, tokenizer, image_seq_length=4, chat_template=template).save_pretrained(folder)
    else:
        tokenizer.chat_template = CHAT_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
        tokenizer.save_pretrained(folder)
        patch_size = 14 if family == "qwen2_5_vl" else 16
        unit = (2 * patch_size) ** 2
        Qwen2VLImageProcessorPil(
            size={"shortest_edge": unit, "longest_edge": 16 * unit}, patch_size=patch_size
        ).save_pretrained(folder)
    return folder


def _build_tokenizer(family: str) -> Qwen2Tokenizer:
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    special = [*SPECIAL[:3], *names.values(), *SPECIAL[6:]] if family == "gemma3" else SPECIAL
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(ByteLevel.alphabet())])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], eos_token="<|im_end|>", additional_special_tokens=[special[1], *special[3:]]
    )
    for name, token in names.items() if family == "gemma3" else ():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", vocabulary[token])
        tokenizer.init_kwargs[name] = token
    return tokenizer


def _build_model(family: str, vocab_size: int) -> PreTrainedModel:
    tokens = {"image_token_id": IMAGE, "tie_word_embeddings": False}
    if family == "llava":
        vision = CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
        return LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=Qwen2Config(vocab_size=vocab_size, **TEXT), **tokens)
        )
    if family == "gemma3":
        text = {"vocab_size": vocab_size, "query_pre_attn_scalar": 8, "sliding_window": 24, **TEXT}
        shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        places = {"boi_token_index": VISION_START, "eoi_token_index": VISION_END, "image_token_index": IMAGE}
        return Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config=text,
                vision_config={**shape, "image_size": 56, "patch_size": 14},
                mm_tokens_per_image=4,
                **places,
                **tokens,
            )
        )
    tokens |= {"video_token_id": VIDEO, "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    text: dict[str, Any] = {"vocab_size": vocab_size, "rope_parameters": rope, **TEXT}
    vision_shape = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    if family == "qwen2_5_vl":
        vision = {**vision_shape, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))
    vision = {**vision_shape, "patch_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **tokens))


def make_image(seed: int, size: tuple[int, int] = (56, 56)) -> bytes:
    """A PNG of coloured noise in blocks, different for each seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return encode_png(Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST))


@dataclass(frozen=True)
class LoadedModel:
    """A model with its processor."""

    model: PreTrainedModel
    reader: MultimodalProcessor
    vision: VisionAdapter

    def encode(self, messages: Sequence[dict[str, Any]]) -> TokenPrompt:
        return TokenPrompt(
            self.reader.apply_chat_template(messages, add_generation_prompt=True), collect_images(messages)
        )


def load_vision_model(folder: Path) -> LoadedModel:
    config = ModelConfig(path=str(folder))
    model, reader = load_model(config, torch.device("cpu")), load_reader(config, 10**6)
    assert reader is not None
    return LoadedModel(model, reader, VisionAdapter(model, reader))


def make_messages(num_images: int, text: str = "how long is it?") -> list[dict[str, Any]]:
    """A system message, and a question with images of three sizes before, within and after its text."""
    if num_images == 0:
        return [{"role": "system", "content": "Short."}, {"role": "user", "content": text}]
    images = [{"type": "image", "image": make_image(i, (56 + 28 * (i % 3), 56))} for i in range(num_images)]
    first, *others = images
    parts = [first, {"type": "text", "text": text}, *others]
    return [{"role": "system", "content": "Short."}, {"role": "user", "content": parts}]


@torch.no_grad()
def plain_logits(
    model: nn.Module, reader: MultimodalProcessor, messages: Sequence[dict[str, Any]], response: Sequence[int]
) -> Tensor:
    """Logits [T, V] of each response token from the processor's encoding and a plain forward pass of one sample."""
    inputs = encode_plainly(reader, messages)
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([list(response)])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        padding = torch.zeros(1, len(response), dtype=torch.long)
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], padding], dim=1)
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None  # of an earlier call
    return model(**inputs).logits[0, length - 1 : -1].float()


def encode_plainly(reader: MultimodalProcessor, messages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The encoding of a chat by transformers' processor."""

    def open_parts(content: Any) -> Any:
        if isinstance(content, str):
            return [{"type": "text", "text": content}]
        return [
            {"type": "image", "image": open_image(p["image"], 10**6)} if p["type"] == "image" else p for p in content
        ]

    conversation = [{**message, "content": open_parts(message["content"])} for message in messages]
    return dict(
        reader.processor.apply_chat_template(
            conversation,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            chat_template=reader.chat_template,
        )
    )
