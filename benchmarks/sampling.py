"""Time of sampling, compared with forward passes alone (lower bound) and with transformers' generate.

    python benchmarks/sampling.py

One random Qwen2 samples in one process. These methods alternate: ``generate``; ours; ours with torch's linear layers;
and the lower bound, forward passes over the same number of tokens without cache and sampling, with either kind of
linear layers. No response stops early, so that all methods do the same work. The table has medians over the rounds.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from record import print_table, save
from transformers import Qwen2ForCausalLM
from workload import Workload

from sdpo.kernels.cpu.fast_linear import speed_up_linear_layers
from sdpo.models.generation.sampling import SamplingParams, sample_responses
from sdpo.models.multimodal.processor import TokenPrompt

PROMPTS, ROLLOUTS, PROMPT_LENGTH, RESPONSE_LENGTH = 8, 8, 56, 64
VOCABULARIES = (4096, 32768)


def build_methods(model: Qwen2ForCausalLM) -> dict[str, Callable[[], Any]]:
    rows = PROMPTS * ROLLOUTS
    models = {False: model, True: copy.deepcopy(model)}
    speed_up_linear_layers(models[True])
    prompts = torch.randint(3, model.config.vocab_size, (PROMPTS, PROMPT_LENGTH))
    repeated = prompts.repeat_interleave(ROLLOUTS, dim=0)
    token, position = repeated[:, :1], torch.zeros(rows, 1, dtype=torch.long)
    sampling_params = SamplingParams(
        n=ROLLOUTS,
        max_new_tokens=RESPONSE_LENGTH,
        temperature=1.0,
        top_p=1.0,
        batch_size=rows,
        stop_token_ids=[],
        pad_token_id=0,
    )

    def generate() -> None:
        model.generate(
            repeated,
            attention_mask=torch.ones_like(repeated),
            do_sample=True,
            top_k=0,
            max_new_tokens=RESPONSE_LENGTH,
            pad_token_id=0,
        )

    def sample(*, fast: bool) -> None:
        sample_responses([(models[fast], 1.0)], [TokenPrompt(ids) for ids in prompts.tolist()], sampling_params, seed=0)

    def run_forward(*, fast: bool) -> None:
        with torch.no_grad():
            models[fast](prompts, use_cache=False, logits_to_keep=1)
            for _ in range(RESPONSE_LENGTH - 1):
                models[fast](token, position_ids=position, use_cache=False)

    return {
        "generate": generate,
        "ours": lambda: sample(fast=True),
        "ours_torch_linear": lambda: sample(fast=False),
        "forward_passes": lambda: run_forward(fast=True),
        "forward_passes_torch_linear": lambda: run_forward(fast=False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table, results = [], {}
    for vocab_size in VOCABULARIES:
        methods = build_methods(Workload(vocab_size, num_heads=8, num_key_value_heads=8).build_model().eval())
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        for round_ in range(options.rounds + 1):
            for name, method in methods.items():
                started = time.perf_counter()
                method()
                if round_:  # the first round is a warm-up
                    seconds[name].append(time.perf_counter() - started)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        ratios = {
            name: statistics.median(
                own / of_generate for own, of_generate in zip(times, seconds["generate"], strict=True)
            )
            for name, times in seconds.items()
        }
        for name in methods:
            table.append([f"{vocab_size:,}: {name}", medians[name], min(seconds[name]), ratios[name]])
        results[str(vocab_size)] = {
            name: {"median": medians[name], "fastest": min(seconds[name]), "over_generate": ratios[name]}
            for name in methods
        }
    print_table(
        f"Seconds for {PROMPTS} prompts x {ROLLOUTS} rollouts, {PROMPT_LENGTH} + {RESPONSE_LENGTH} tokens",
        ["vocabulary: method", "median", "fastest", "over generate"],
        table,
    )
    save("sampling", {"rounds": options.rounds, "threads": options.threads, "load": os.getloadavg()[0], **results})


if __name__ == "__main__":
    main()
