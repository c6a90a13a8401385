"""Vision-language models against transformers' processor and plain forward passes of one sample."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vision_language import (
    FAMILIES,
    IMAGE,
    STOP,
    LoadedModel,
    encode_plainly,
    load_vision_model,
    make_image,
    make_messages,
    plain_logits,
)

from sdpo.config.model import ModelConfig
from sdpo.errors import SDPOError
from sdpo.models.forward import compute_logits, compute_positions, pad_sequences
from sdpo.models.generation.sampling import Completion, SamplingParams, sample_responses
from sdpo.models.loading import reads_images
from sdpo.models.multimodal import feature_cache
from sdpo.models.multimodal import processor as processing_module
from sdpo.models.multimodal.feature_cache import ImageFeatureCache
from sdpo.models.multimodal.processor import TokenPrompt, load_processor, load_reader
from sdpo.models.multimodal.vision_tower import ImageFeatures, get_vision_tower_parameters, inject_image_features

VisionModel = Callable[[str], LoadedModel]
NUM_IMAGES = (0, 1, 3)
# Enough stop tokens that responses leave their batch early.
STOP_TOKENS = [STOP, *range(7, 263, 6)]
every_family = pytest.mark.parametrize("family", FAMILIES)


def decode(loaded: LoadedModel, temperature: float = 0.8) -> list[list[Completion]]:
    decoding = SamplingParams(
        n=3,
        max_new_tokens=8,
        temperature=temperature,
        top_p=1.0,
        batch_size=6,
        stop_token_ids=STOP_TOKENS,
        pad_token_id=0,
        suppress_tokens=loaded.vision.placeholder_ids,
    )
    prompts = [loaded.encode(make_messages(number)) for number in NUM_IMAGES]
    return sample_responses([(loaded.model, 1.0)], prompts, decoding, 0, loaded.vision)


# --- the processor


@every_family
@pytest.mark.parametrize("num_images", NUM_IMAGES)
def test_token_ids_and_pixels_equal_the_processors(vision_model: VisionModel, family: str, num_images: int) -> None:
    loaded = vision_model(family)
    prompt = loaded.encode(make_messages(num_images))
    plain = encode_plainly(loaded.reader, make_messages(num_images))
    assert list(prompt.token_ids) == plain["input_ids"][0].tolist()
    assert list(prompt.token_ids).count(IMAGE) >= 2 * num_images
    pixels = [loaded.reader.read_pixels(image) for image in prompt.images]
    assert len(pixels) == num_images
    if num_images:
        for name in pixels[0]:
            assert torch.equal(torch.cat([each[name] for each in pixels]), plain[name])


def test_image_is_processed_once(vision_model: VisionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = vision_model("qwen2_5_vl")
    prepared = []
    kind = type(loaded.reader.processor.image_processor)
    call = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, *a, **k: (prepared.append(1), call(self, *a, **k))[1])
    for _ in range(3):
        prompt = loaded.encode(make_messages(3))
        loaded.reader.read_pixels(prompt.images[0])
    assert len(prepared) == 1 + 3, "a probe of the image tokens, and three images"


def test_positions_need_no_second_image_processing(
    vision_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step may have more images than the maximum of the cache of processed images."""
    monkeypatch.setattr(processing_module, "CACHED_IMAGES", 1)
    loaded = load_vision_model(vision_dir("qwen2_5_vl"))
    prompt = loaded.encode(make_messages(3))
    expected = loaded.vision.compute_positions(prompt)
    read = []
    monkeypatch.setattr(processing_module, "open_image", lambda *_: read.append(1))
    assert torch.equal(loaded.vision.compute_positions(prompt), expected)
    assert read == []


def test_positions_of_equal_prompts_are_computed_once(
    vision_model: VisionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rollouts of one prompt, one of another with an image, one without; a copy is the same image."""
    loaded = vision_model("qwen2_5_vl")
    first, other, text = (loaded.encode(make_messages(number)) for number in (2, 1, 0))
    copy = TokenPrompt(list(first.token_ids), tuple(bytes(bytearray(image)) for image in first.images))
    alone = [compute_positions([prompt], 5, loaded.vision)[0] for prompt in (first, first, other, text)]
    found, find = [], loaded.vision.compute_positions
    monkeypatch.setattr(loaded.vision, "compute_positions", lambda prompt: (found.append(prompt), find(prompt))[1])
    together = compute_positions([first, copy, other, text], 5, loaded.vision)
    assert len(found) == 2
    for own, expected, prompt in zip(together, alone, (first, first, other, text), strict=True):
        assert torch.equal(own, expected)
        shorter = compute_positions([prompt], 2, loaded.vision)[0]
        assert torch.equal(own[:, : len(prompt.token_ids) + 2], shorter)


def test_processor_without_videos_can_be_saved(vision_dir: Callable[[str], Path], tmp_path: Path) -> None:
    processor = load_processor(str(vision_dir("qwen2_5_vl")))
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((vision_dir("qwen2_5_vl") / "config.json").read_text())
    again = load_processor(str(tmp_path))
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    assert (tmp_path / "preprocessor_config.json").is_file(), "processors with videos read their settings here"


def test_language_model_has_no_processor(hidden_rule_dir: Path) -> None:
    config = ModelConfig(path=str(hidden_rule_dir / "model"))
    assert not reads_images(config)
    assert load_reader(config, 1000) is None


def test_processor_that_cannot_be_loaded_is_refused(vision_dir: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((vision_dir("llava") / "config.json").read_text())
    with pytest.raises(SDPOError, match=r"its processor cannot be loaded"):
        load_reader(ModelConfig(path=str(tmp_path)), 1000)


@every_family
@pytest.mark.parametrize("num_images", [0, 1])
def test_image_token_in_a_text_is_refused(vision_model: VisionModel, family: str, num_images: int) -> None:
    loaded = vision_model(family)
    token = "<start_of_image>" if family == "gemma3" and num_images else loaded.reader.image_token
    counted = re.escape(f"a prompt with {num_images} images has {num_images + 1} {token}: its text must not contain")
    if family == "gemma3" and num_images:
        counted = "Prompt contained 2 image tokens but received 1 images"
    with pytest.raises(SDPOError, match=counted):
        loaded.encode(make_messages(num_images, text=f"what is {token}?"))


def test_max_pixels_limits_the_image_tokens(vision_dir: Callable[[str], Path]) -> None:
    counts = []
    for max_pixels in (10**6, 56 * 56):
        reader = load_reader(ModelConfig(path=str(vision_dir("qwen2_5_vl"))), max_pixels)
        assert reader is not None
        content = [{"type": "image", "image": make_image(0, (112, 112))}]
        counts.append(reader.apply_chat_template([{"role": "user", "content": content}]).count(IMAGE))
    assert counts == [16, 4]


# --- sampling


@every_family
def test_sampled_log_probs_equal_a_forward_pass(vision_model: VisionModel, family: str) -> None:
    loaded = vision_model(family)
    assert len({len(one.token_ids) for many in decode(loaded) for one in many}) > 2, "none leaves the batch early"
    for number, responses in zip(NUM_IMAGES, decode(loaded), strict=True):
        for response in responses:
            logits = plain_logits(loaded.model, loaded.reader, make_messages(number), response.token_ids) / 0.8
            logits[:, loaded.vision.placeholder_ids] = float("-inf")
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(response.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(response.log_probs), expected, atol=1e-4, rtol=0)


@every_family
def test_greedy_decoding_equals_generate(vision_model: VisionModel, family: str) -> None:
    loaded = vision_model(family)
    for number, responses in zip(NUM_IMAGES, decode(loaded, temperature=0.0), strict=True):
        inputs = encode_plainly(loaded.reader, make_messages(number))
        generated = loaded.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=8,
            eos_token_id=STOP_TOKENS,
            pad_token_id=0,
            suppress_tokens=loaded.vision.placeholder_ids,
        )[0, inputs["input_ids"].shape[1] :].tolist()
        assert all(response.token_ids == generated for response in responses)


def test_image_tokens_are_never_sampled(vision_model: VisionModel) -> None:
    loaded = vision_model("qwen2_5_vl")
    with torch.no_grad():
        loaded.model.lm_head.weight[loaded.vision.placeholder_ids] *= 30
    drawn = {token for many in decode(loaded, 3.0) for one in many for token in one.token_ids}
    assert drawn
    assert not drawn & set(loaded.vision.placeholder_ids)


@every_family
def test_log_probs_depend_on_the_images(vision_model: VisionModel, family: str) -> None:
    """Outputs depend on the own image only; the tests above would not detect ignored or swapped features."""
    loaded = vision_model(family)
    messages = make_messages(1)
    other = [
        messages[0],
        {"role": "user", "content": [{"type": "image", "image": make_image(9)}, *messages[1]["content"][1:]]},
    ]
    [response] = decode(loaded)[1][:1]
    logits = [plain_logits(loaded.model, loaded.reader, m, response.token_ids) for m in (messages, other)]
    assert (logits[0] - logits[1]).abs().max() > 1e-2


# --- the tower


def batch_logits(loaded: LoadedModel, prompts: list[TokenPrompt], features: list[ImageFeatures]) -> torch.Tensor:
    batch = pad_sequences(prompts, [[7, 8, 9]] * len(prompts), 0, torch.device("cpu"), loaded.vision)
    return compute_logits(
        loaded.model,
        batch.token_ids,
        batch.attention_mask,
        batch.position_ids,
        3,
        vision=loaded.vision,
        features=features,
    )


@every_family
@pytest.mark.parametrize("chunk_size", [1, 4_000, 2**22])
def test_gradients_through_cached_features_equal_a_tower_run_per_sequence(
    vision_model: VisionModel, family: str, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-batches with five and two images: value and every gradient, chunk by chunk."""
    monkeypatch.setattr(feature_cache, "CHUNK_SIZE", chunk_size)
    loaded = vision_model(family)
    first, second = loaded.encode(make_messages(3)), loaded.encode(make_messages(1))
    micro_batches = [[first, second, first], [second, loaded.encode(make_messages(0))]]
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 1, 263, generator=generator)

    def gradients() -> dict[str, Any]:
        found = {n: p.grad.clone() for n, p in loaded.model.named_parameters() if p.grad is not None}
        loaded.model.zero_grad(set_to_none=True)
        return found

    naive_logits, ours_logits = [], []
    for prompts in micro_batches:
        for prompt in prompts:  # a separate tower pass per prompt
            inputs = {"input_ids": torch.tensor([[*prompt.token_ids, 7, 8, 9]])}
            pixels = [loaded.reader.read_pixels(image) for image in prompt.images]
            for name in pixels[0] if pixels else ():
                inputs[name] = torch.cat([each[name] for each in pixels])
            if pixels:
                inputs |= loaded.vision.image_token_mask(inputs["input_ids"])
            if loaded.vision.num_axes > 1:
                inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
                loaded.model.model.rope_deltas = None
            naive_logits.append(loaded.model(**inputs).logits[0, -3:])
            (naive_logits[-1] * weights[:, 0]).sum().backward()
    expected = gradients()

    seen = ImageFeatureCache(loaded.reader, student=loaded.model)
    for prompts in micro_batches:
        logits = batch_logits(
            loaded, prompts, seen.select(loaded.model, [image for p in prompts for image in p.images])
        )
        ours_logits.extend(logits)
        (logits * weights[:, 0]).sum().backward()
    seen.backward()
    found = gradients()

    torch.testing.assert_close(torch.stack(ours_logits), torch.stack(naive_logits), atol=1e-4, rtol=1e-4)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    tower = {id(p) for p in get_vision_tower_parameters(loaded.model)}
    assert any(id(p) in tower and n in expected for n, p in loaded.model.named_parameters())

    seen.backward()
    assert all(gradient.abs().max() == 0 for n, gradient in gradients().items()), "gradients were propagated twice"


@every_family
def test_vision_tower_runs_once_per_distinct_image(vision_model: VisionModel, family: str) -> None:
    loaded = vision_model(family)
    images = [make_image(i) for i in range(3)]
    seen = ImageFeatureCache(loaded.reader)
    passed = []
    inner = loaded.model.model
    make = inner.get_image_features
    inner.get_image_features = lambda *a, **k: (passed.append(len((o := make(*a, **k)).pooler_output)), o)[1]
    seen.select(loaded.model, [images[0], images[1], images[0]])
    seen.select(loaded.model, [images[2], images[1]])
    assert passed == [2, 1]


def test_injected_features_apply_only_inside_the_context(vision_model: VisionModel) -> None:
    loaded = vision_model("qwen3_vl")
    [features] = ImageFeatureCache(loaded.reader).select(loaded.model, [make_image(0)])
    assert len(features.by_layer) == 2, "Qwen3-VL's deepstack"
    with pytest.raises(ZeroDivisionError), inject_image_features(loaded.model, [features]):
        assert "get_image_features" in vars(loaded.model.model)
        _ = 1 / 0
    assert "get_image_features" not in vars(loaded.model.model)


def test_vision_tower_is_all_but_the_language_model(vision_model: VisionModel) -> None:
    for family in FAMILIES:
        model = vision_model(family).model
        tower = {id(p) for p in get_vision_tower_parameters(model)}
        names = {
            n.split(".")[1] if n.startswith("model.") else n.split(".")[0]: id(p) in tower
            for n, p in model.named_parameters()
        }
        assert names.pop("language_model") is False
        assert names.pop("lm_head") is False
        assert names
        assert all(names.values())


def test_model_without_get_image_features_is_refused() -> None:
    with pytest.raises(SDPOError, match=r"Linear has no model\.get_image_features; it is not supported"):
        get_vision_tower_parameters(torch.nn.Linear(1, 1))
