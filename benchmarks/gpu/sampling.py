"""Tokens per second of sampling on one GPU: decoding steps captured as CUDA graphs, and without.

    python benchmarks/gpu/sampling.py OUT.json               # a minute on one GPU
    TRIAL=1 python benchmarks/gpu/sampling.py OUT.json       # tiny sizes on a CPU

A random Qwen2.5 of 0.5B parameters in bfloat16 samples 64 responses of 256 tokens, none of which ends early.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from gpu_step import SHAPES, VOCAB_SIZE
from record import describe_machine, print_table
from transformers import Qwen2Config, Qwen2ForCausalLM

from sdpo.models.generation import graphed_decoding, sampling
from sdpo.models.generation.decoding_state import DecodingState
from sdpo.models.multimodal.processor import TokenPrompt

TRIAL = bool(os.environ.get("TRIAL"))
DEVICE = "cpu" if TRIAL else "cuda"
NUM_PROMPTS, NUM_ROLLOUTS, PROMPT_LENGTH, RESPONSE_LENGTH = (2, 2, 8, 40) if TRIAL else (8, 8, 512, 256)


def build_model() -> Qwen2ForCausalLM:
    hidden_size, intermediate_size, num_layers, num_heads, num_key_value_heads = SHAPES["tiny" if TRIAL else "0.5B"]
    config = Qwen2Config(
        vocab_size=512 if TRIAL else VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        tie_word_embeddings=True,
    )
    with torch.device(DEVICE):
        return Qwen2ForCausalLM(config).to(torch.bfloat16).eval()


def time_sampling(model: Qwen2ForCausalLM) -> float:
    """Tokens per second of the second call; the first compiles kernels."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, model.config.vocab_size, (NUM_PROMPTS, PROMPT_LENGTH), generator=generator)
    params = sampling.SamplingParams(
        n=NUM_ROLLOUTS,
        max_new_tokens=RESPONSE_LENGTH,
        temperature=1.0,
        top_p=1.0,
        batch_size=NUM_PROMPTS * NUM_ROLLOUTS,
        stop_token_ids=[],
        pad_token_id=0,
    )
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        sampling.sample_responses([(model, 1.0)], [TokenPrompt(ids) for ids in prompts.tolist()], params, seed=0)
        seconds = time.perf_counter() - started
    return NUM_PROMPTS * NUM_ROLLOUTS * RESPONSE_LENGTH / seconds


def main() -> None:
    model = build_model()
    build, rates = sampling.build_decoding_state, {}
    if TRIAL:
        graphed_decoding.can_be_captured = lambda _: True
    ways = {"captured": build, "not captured": lambda policy, capacity, _: DecodingState(policy, capacity)}
    for name, way in ways.items():
        sampling.build_decoding_state = way
        rates[name] = time_sampling(model)
    print_table("Sampling, tokens per second", ["", "tokens per second"], [[*item] for item in rates.items()])
    Path(sys.argv[1]).write_text(json.dumps({"machine": describe_machine(), "tokens_per_second": rates}, indent=2))


if __name__ == "__main__":
    main()
