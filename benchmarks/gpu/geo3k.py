"""Memory and time of three steps of configs/geo3k_1gpu.yaml on Qwen2.5-VL-3B's architecture with random weights.

    python benchmarks/gpu/geo3k.py FOLDER                   # one GPU of 80 GB, about four minutes
    python benchmarks/gpu/geo3k.py FOLDER --engine train    # the same config file on the native trainer
    python benchmarks/gpu/geo3k.py FOLDER --tiny            # a trial without a GPU

The script needs no network: the weights are random, ``sdpo data geo3k --drawn`` draws the problems, and the tokenizer
comes from the toy task. No response ends early (``ignore_eos``), so a micro-batch is as large as the config file
allows. Only the number of prompts per step is smaller than in the config file. The script prints nvidia-smi's peak GPU
memory, verl's peak per phase and the seconds of each phase, and writes FOLDER/geo3k.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ARCHITECTURE = ROOT / "tests" / "golden" / "qwen2_5_vl_3b" / "config.json"
TINY_TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
PRINTED = (
    "perf/",
    "timing_s/",
    "self_distillation/loss",
    "response_length/mean",
    "actor/grad_norm",
    "training/rollout_",
)


def write_model(folder: Path, *, tiny: bool) -> None:
    """Write a model of Qwen2.5-VL's architecture with random weights and the special tokens of the toy task."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from sdpo.rewards.toy import figures

    tokenizer = figures.build_tokenizer()
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(figures.VISION_TOKENS))
    values = json.loads(ARCHITECTURE.read_text())
    values |= {"vision_start_token_id": start, "vision_end_token_id": end, "image_token_id": image}
    values |= {"video_token_id": video, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    values |= {"pad_token_id": tokenizer.pad_token_id}
    if tiny:
        values |= {**TINY_TEXT, "num_key_value_heads": 2, "vocab_size": 512}
        values["rope_scaling"] = {"type": "mrope", "mrope_section": [4, 6, 6]}
        small = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 64}
        values["vision_config"] |= small | {"fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(**values)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(size={"shortest_edge": 4 * 28 * 28, "longest_edge": 1280 * 28 * 28}).save_pretrained(
        folder
    )


class MemorySampler(threading.Thread):
    """Memory in use on the first GPU, in MiB; queries nvidia-smi twice per second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.over_time: list[tuple[float, int]] = []
        self.start()

    def run(self) -> None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
        started = time.perf_counter()
        while True:
            try:
                used = int(subprocess.run(query, capture_output=True, text=True).stdout.split()[0])
            except (OSError, IndexError, ValueError):
                return
            self.peak = max(self.peak, used)
            self.over_time.append((round(time.perf_counter() - started, 1), used))
            time.sleep(0.5)


def build_command(folder: Path, options: argparse.Namespace) -> list[str]:
    settings: dict[str, Any] = {
        "output_dir": folder / "run",
        "model.path": folder / "model",
        "data.train_files": f"[{folder}/data/train.parquet]",
        "data.val_files": f"[{folder}/data/test.parquet]",
        "data.train_batch_size": options.prompts,
        "max_steps": options.steps,
        "eval_steps": 0,
        "save_steps": 0,
        "eval.val_before_train": "false",
        "eval.max_prompts": 1,
        "tracking.name": "geo3k",
    }
    if options.tiny:
        settings |= {"rollout.n": 2, "rollout.max_response_length": 16, "data.max_pixels": 84 * 84}
    verl = {
        "actor_rollout_ref.rollout.ignore_eos": "true",
        "actor_rollout_ref.rollout.enforce_eager": "true",
        "actor_rollout_ref.rollout.agent.num_workers": 1,
        "reward.num_workers": 1,
        "trainer.test_freq": -1,
        "trainer.save_freq": -1,
    }
    settings |= verl if options.engine == "verl" else {}
    arguments = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "sdpo.cli", options.engine, str(ROOT / "configs" / "geo3k_1gpu.yaml"), *arguments]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", help="settings of the config file or of verl")
    parser.add_argument("--engine", choices=["verl", "train"], default="verl")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    folder = options.folder.absolute()
    if not (folder / "model").exists():
        started = time.perf_counter()
        write_model(folder / "model", tiny=options.tiny)
        from sdpo.rewards.toy.synthetic_geometry import write_drawn_geometry

        write_drawn_geometry(folder / "data", 64, 16)
        print(f"model and data written in {time.perf_counter() - started:.0f} s", flush=True)
    memory, started = MemorySampler(), time.perf_counter()
    command = [*build_command(folder, options), *options.overrides]
    log = folder / f"{options.engine}.log"
    with log.open("w") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
    lines = log.read_text(errors="replace").splitlines()
    print(f"exit code {code} after {time.perf_counter() - started:.0f} s; peak GPU memory {memory.peak} MiB")
    metrics = folder / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    for row in rows:
        values = row.get("data", row)
        printed = {k: round(v, 4) for k, v in values.items() if k.startswith(PRINTED) and isinstance(v, (int, float))}
        print(json.dumps({"step": row.get("step"), **printed}))
    if code:
        print("\n".join(line[:300] for line in lines[-40:]))
    result = {"command": command, "code": code, "peak_mib": memory.peak, "memory": memory.over_time, "rows": rows}
    (folder / "geo3k.json").write_text(json.dumps(result))
    return code


if __name__ == "__main__":
    sys.exit(main())
