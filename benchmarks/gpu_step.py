"""Training phase of the native trainer on a GPU: tokens per second, and utilisation relative to matrix products.

    python benchmarks/gpu_step.py                    # Qwen2.5 of 0.5B and 1.5B parameters, one GPU of 80 GB
    python benchmarks/gpu_step.py --models 3B
    python benchmarks/gpu_step.py --tiny             # a trial without a GPU

The model has the architecture of Qwen2.5 and random weights in bfloat16. The script builds the samples before it
measures. The training phase is ``Actor.update_policy`` on the rollouts of a step: forward pass of the teacher, forward
and backward pass of the student, loss over the full vocabulary, optimizer, teacher update. Token counts include student
and teacher. Utilisation is the model's floating-point operations (without recomputation) per second of the phase, over
the rate of large matrix products on the same GPU in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from record import print_table, read_peak, reset_peak, run_all, save
from workload import Workload

# hidden size, intermediate size, layers, heads, key-value heads of the released models
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2),
    "1.5B": (1536, 8960, 28, 12, 2),
    "3B": (2048, 11_008, 36, 16, 2),
    "tiny": (64, 128, 2, 4, 2),
}
VOCAB_SIZE = 151_936


def build_workload(model: str, options: argparse.Namespace) -> Workload:
    hidden_size, intermediate_size, num_layers, num_heads, num_key_value_heads = SHAPES[model]
    return Workload(
        vocab_size=512 if options.tiny else VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        dtype="bfloat16",
        num_prompts=options.prompts,
        n=options.n,
        prompt_length=options.prompt,
        response_length=options.response,
        feedback_length=options.feedback,
    )


def count_operations(model: Any, lengths: Sequence[int], num_kept: int) -> int:
    """Floating-point operations of a forward pass whose output layer is computed for ``num_kept`` tokens."""
    head = model.get_output_embeddings().weight
    embeddings = {id(param): param.numel() for param in (head, model.get_input_embeddings().weight)}
    layer_params = sum(param.numel() for param in model.parameters()) - sum(embeddings.values())
    # Scores and weighted values: 2 operations each per pair of tokens; the causal mask leaves half of the pairs.
    # All heads together are as wide as the model.
    per_pair = 2 * 2 * model.config.hidden_size * model.config.num_hidden_layers
    attention = sum(per_pair * length * length // 2 for length in lengths)
    return 2 * layer_params * sum(lengths) + attention + 2 * head.numel() * num_kept


def measure(model: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from sdpo.observability.progress import NullCallback
    from sdpo.trainer.build import build_components

    device = torch.device("cpu" if options.tiny else "cuda")
    if options.tiny:
        torch.set_num_threads(1)
    workload = build_workload(model, options)
    overrides = [
        f"actor.device={device.type}",
        f"actor.max_tokens_per_micro_batch={options.max_tokens_per_micro_batch}",
    ]
    overrides.append(f"actor.gradient_checkpointing={options.gradient_checkpointing}")
    with tempfile.TemporaryDirectory() as name:
        workload.write(Path(name))
        run = workload.load(Path(name), overrides)
        components = build_components(run, NullCallback())
    samples = workload.build_samples(components, run)
    responses = [len(sample.response.token_ids) for sample in samples]
    student = [len(sample.prompt.token_ids) + length for sample, length in zip(samples, responses, strict=True)]
    teacher = [len(s.teacher_prompt.token_ids) + length for s, length in zip(samples, responses, strict=True)]
    operations = [count_operations(components.actor.student, each, sum(responses)) for each in (student, teacher)]

    components.actor.update_policy(samples)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak()
    seconds = statistics.median(
        time_call(device, lambda: components.actor.update_policy(samples)) for _ in range(options.repeats)
    )
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else read_peak()
    # A backward pass takes twice the operations of the forward pass.
    rate = (3 * operations[0] + operations[1]) / seconds
    product_rate = measure_products(device, options)
    return {
        "model": model,
        "parameters": sum(param.numel() for param in components.actor.student.parameters()),
        "samples": len(samples),
        "response_tokens": sum(responses),
        "tokens": sum(student) + sum(teacher),
        "seconds": seconds,
        "tokens_a_second": (sum(student) + sum(teacher)) / seconds,
        "operations_a_second": rate,
        "product_operations_a_second": product_rate,
        "utilisation": rate / product_rate,
        "peak_bytes": peak,
    }


def measure_products(device: Any, options: argparse.Namespace) -> float:
    """Operations per second of a product of large square matrices in bfloat16."""
    import torch

    size = 512 if options.tiny else 8192
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    torch.mm(left, right)
    seconds = statistics.median(time_call(device, lambda: torch.mm(left, right)) for _ in range(10))
    return 2 * size**3 / seconds


def time_call(device: Any, call: Callable[[], Any]) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["0.5B", "1.5B"], choices=SHAPES)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("-n", type=int, default=8, help="rollouts per prompt")
    parser.add_argument("--prompt", type=int, default=512, help="tokens per prompt")
    parser.add_argument("--feedback", type=int, default=256, help="tokens of feedback in the teacher context")
    parser.add_argument("--response", type=int, default=1024, help="tokens per response")
    parser.add_argument("--max-tokens-per-micro-batch", type=int, default=16_384)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="run a trial with the smallest sizes on the CPU")
    parser.add_argument("--note", default="", help="other load on the machine; saved with the results")
    options = parser.parse_args()
    if options.tiny:
        options.models, options.prompts, options.n = ["tiny"], 2, 2
        options.prompt, options.feedback, options.response = 64, 8, 16
    measured: list[dict[str, Any]] = []
    for model in options.models:
        measured += run_all(measure, [(model, options)], workers=1)
        save("gpu_step", {"note": options.note, "options": vars(options), "measured": measured})
    print_table(
        f"Training on {options.prompts} x {options.n} rollouts of {options.response} tokens",
        ["", "seconds", "tokens/s", "TFLOP/s", "products, TFLOP/s", "utilisation", "peak, GB"],
        [
            [
                m["model"],
                m["seconds"],
                round(m["tokens_a_second"]),
                m["operations_a_second"] / 1e12,
                m["product_operations_a_second"] / 1e12,
                m["utilisation"],
                m["peak_bytes"] / 1e9,
            ]
            for m in measured
        ],
    )


if __name__ == "__main__":
    main()
