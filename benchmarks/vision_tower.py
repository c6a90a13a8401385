"""Time of a step with the vision tower once per image, compared with once per sequence.

    python benchmarks/vision_tower.py

A step samples and trains on n = 8 rollouts per prompt, with one image per prompt (student, EMA teacher, full
vocabulary). The native trainer runs the tower once per image. The naive form runs it once per sequence: n passes at
sampling, n of the student with its graph, n of the teacher. Samples and weights are the same; the two forms alternate.
The model is random and small, with the proportions of Qwen2.5-VL-3B: an eighth of its widths, a quarter of its depths.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from record import print_table, save
from torch import nn

from sdpo.config.actor import ActorConfig
from sdpo.config.data import DataConfig
from sdpo.config.model import ModelConfig
from sdpo.config.rollout import RolloutConfig
from sdpo.config.root import SDPOConfig
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.models.generation.sampling import Completion, SamplingParams, sample_responses
from sdpo.models.loading import load_model
from sdpo.models.multimodal import vision_tower
from sdpo.models.multimodal.feature_cache import ImageFeatureCache
from sdpo.models.multimodal.processor import encode_png, load_reader
from sdpo.models.multimodal.vision_tower import ImageFeatures, VisionAdapter, freeze_vision_tower
from sdpo.prompting.demonstrations import PrivilegedContext, ScoredRollout
from sdpo.prompting.teacher_context import TeacherContext
from sdpo.prompting.tokenization import encode_teacher_prompt
from sdpo.rewards.base import Row
from sdpo.rewards.toy import base, figures
from sdpo.trainer.actor import forward as forward_module
from sdpo.trainer.actor.build import build_actor
from sdpo.trainer.data.prompts import Prompt
from sdpo.trainer.data.samples import TrainingSample


class TowerPerSequence(ImageFeatureCache):
    """Naive form: caches no features, and keeps the graph of the student's tower."""

    def select(self, model: nn.Module, images: Sequence[bytes]) -> list[ImageFeatures]:
        pixels = [self.reader.read_pixels(image) for image in images]
        return vision_tower.run_vision_tower(model, pixels) if pixels else []

    def backward(self) -> None: ...


def build_model(folder: Path) -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

    tokenizer = base.build_tokenizer([], figures.CHAT_TEMPLATE, figures.VISION_TOKENS)
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(figures.VISION_TOKENS))
    text = dict(
        vocab_size=19_000,
        hidden_size=256,
        intermediate_size=1376,
        num_hidden_layers=9,
        num_attention_heads=8,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    tower = dict(
        depth=8,
        hidden_size=160,
        intermediate_size=428,
        num_heads=4,
        out_hidden_size=256,
        window_size=112,
        fullatt_block_indexes=[1, 3, 5, 7],
    )
    tokens = dict(image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=True, **tokens)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 10**6}).save_pretrained(folder)


def build_run(folder: Path, options: argparse.Namespace, frozen: bool) -> SDPOConfig:
    return SDPOConfig(
        output_dir=str(folder),
        max_steps=100,
        model=ModelConfig(path=str(folder)),
        data=DataConfig(task="none", train_batch_size=options.prompts),
        rollout=RolloutConfig(n=options.n, max_response_length=options.response),
        actor=ActorConfig(freeze_vision_tower=frozen, max_tokens_per_micro_batch=4096),
        self_distillation=SelfDistillationConfig(ema_update_rate=0.01),
    )


def build_prompts(vision: VisionAdapter, options: argparse.Namespace) -> list[Prompt]:
    rng = np.random.default_rng(0)
    prompts = []
    for _ in range(options.prompts):
        pixels = rng.integers(0, 256, (options.size, options.size, 3), dtype=np.uint8)
        content = [{"type": "image", "image": encode_png(Image.fromarray(pixels))}, {"type": "text", "text": "x" * 60}]
        messages = [{"role": "user", "content": content}]
        prompts.append(Prompt(Row("x", messages, {"ground_truth": "1"}), vision.reader.apply_chat_template(messages)))
    return prompts


def build_samples(
    vision: VisionAdapter, prompts: Sequence[Prompt], responses: Sequence[Sequence[Completion]], run: SDPOConfig
) -> Any:
    shown = PrivilegedContext(solution="12")
    return [
        TrainingSample(
            prompt=prompt,
            response=response,
            rollout=ScoredRollout(group_id, "", 0.0),
            context=TeacherContext(
                shown, encode_teacher_prompt(vision.reader, prompt.row.prompt, shown, run.self_distillation)
            ),
            advantage=0.0,
            distillation_weight=1.0,
        )
        for group_id, (prompt, rollouts) in enumerate(zip(prompts, responses, strict=True))
        for response in rollouts
    ]


def measure(folder: Path, options: argparse.Namespace, frozen: bool) -> dict[str, dict[str, float]]:
    """Median seconds of sampling and training of both forms."""
    run = build_run(folder, options, frozen)
    model, reader = load_model(run.model, torch.device("cpu")), load_reader(run.model, 10**6)
    assert reader is not None
    vision = VisionAdapter(model, reader)
    if frozen:
        freeze_vision_tower(model)
    prompts = build_prompts(vision, options)
    sampling_params = SamplingParams(options.n, options.response, 1.0, 1.0, 64, [], 0, vision.placeholder_ids)

    def sample(naive: bool) -> list[list[Completion]]:
        copies, n = (options.n, 1) if naive else (1, options.n)
        submitted = [prompt.tokens for prompt in prompts for _ in range(copies)]
        return sample_responses([(model, 1.0)], submitted, replace(sampling_params, n=n), 0, vision)

    samples = build_samples(vision, prompts, sample(naive=False), run)
    actor = build_actor(model, run, 0, vision)
    seconds: dict[str, dict[str, list[float]]] = {form: {"sampling": [], "learning": []} for form in ("ours", "naive")}
    for _ in range(options.repeats):
        for form, cache_class in (("ours", ImageFeatureCache), ("naive", TowerPerSequence)):
            forward_module.ImageFeatureCache = cache_class  # type: ignore[misc]
            times = [time.perf_counter()]
            sample(naive=form == "naive")
            times.append(time.perf_counter())
            actor.update_policy(samples)
            times.append(time.perf_counter())
            seconds[form]["sampling"].append(times[1] - times[0])
            seconds[form]["learning"].append(times[2] - times[1])
    return {
        form: {part: statistics.median(values) for part, values in parts.items()} for form, parts in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("-n", type=int, default=8, help="rollouts per prompt")
    parser.add_argument("--size", type=int, default=448, help="pixels along each side of an image")
    parser.add_argument("--response", type=int, default=64, help="tokens per response")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        build_model(Path(name))
        measured = {"trained": measure(Path(name), options, False), "frozen": measure(Path(name), options, True)}
    table, results = [], {}
    for tower, seconds in measured.items():
        ours, naive = seconds["ours"], seconds["naive"]
        ratios = {part: naive[part] / ours[part] for part in ours}
        ratios["step"] = sum(naive.values()) / sum(ours.values())
        table.append([f"tower {tower}", sum(naive.values()), sum(ours.values()), *ratios.values()])
        results[tower] = {"naive_seconds": naive, "seconds": ours, "ratios": ratios}
    print_table(
        f"Step of {options.prompts} prompts x {options.n} rollouts, images of {options.size} x {options.size}",
        ["", "naive, s", "ours, s", "naive/ours: sampling", "training", "step"],
        table,
    )
    save("vision_tower", results | {"options": vars(options)})


if __name__ == "__main__":
    main()
