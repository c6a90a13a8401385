"""Tiny vision-language models with random weights, as folders in the Hugging Face format; torchvision is not needed."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
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

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
SPECIAL += ["<|video_pad|>"]
PAD, STOP, VISION_START, VISION_END, IMAGE, VIDEO = 0, 2, 3, 4, 5, 6
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava")
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
    tokenizer = _build_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _build_model(family, len(tokenizer))
        # Sharp distributions that depend on everything read, images included.
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
    else:
        tokenizer.chat_template = CHAT_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
        tokenizer.save_pretrained(folder)
        patch_size = 14 if family == "qwen2_5_vl" else 16
        unit = (2 * patch_size) ** 2
        Qwen2VLImageProcessorPil(
            size={"shortest_edge": unit, "longest_edge": 16 * unit}, patch_size=patch_size
        ).save_pretrained(folder)
    return folder


def _build_tokenizer() -> Qwen2Tokenizer:
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(ByteLevel.alphabet())])}
    return Qwen2Tokenizer(
        vocab=vocabulary, merges=[], eos_token="<|im_end|>", additional_special_tokens=[SPECIAL[1], *SPECIAL[3:]]
    )


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
    """A PNG of coloured noise in blocks; every seed another."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()
