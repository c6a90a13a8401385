"""Growth of a step's time and memory with each size of the workload, in training and in sampling.

    python benchmarks/growth.py            # a quarter of an hour
    python benchmarks/growth.py --axes vocabulary "prompts per step"

One size at a time is doubled. Each point is the fastest of several calls in a separate process with one thread. The
training time excludes the actor's time for a sample of one response token (optimizer and teacher, which grow with the
model alone). The memory excludes the resident memory before the call, which holds model, teacher and optimizer. The
exponent is the slope of the last three points on logarithmic axes: 1 is linear, 0 is constant. Only attention may grow
faster than linearly, with the square of a length.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from record import compute_slope, describe_kernels, print_table, read_peak, reset_peak, run_all, save
from workload import Workload

from sdpo.kernels.cpu.allocator import keep_freed_memory

BASE = Workload(
    vocab_size=4096,
    hidden_size=128,
    intermediate_size=512,
    num_layers=2,
    num_heads=4,
    num_key_value_heads=4,
    num_prompts=4,
    n=4,
    prompt_length=64,
    response_length=64,
)
AXES = {
    "prompts per step": "num_prompts",
    "rollouts per prompt": "n",
    "prompt length": "prompt_length",
    "response length": "response_length",
    "vocabulary": "vocab_size",
    "layers": "num_layers",
}
FACTORS = (1, 2, 4, 8)
QUANTITIES = ("learning_seconds", "learning_bytes", "sampling_seconds", "sampling_bytes")


def measure(workload: Workload, repeats: int) -> dict[str, float]:
    """Seconds and bytes of training and sampling, above the constant part."""
    import torch

    from sdpo.models.generation.sampling import Completion
    from sdpo.observability.progress import NullCallback
    from sdpo.trainer.build import build_components

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        workload.write(Path(name))
        run = workload.load(Path(name), ["actor.num_threads=1"])
        components = build_components(run, NullCallback())
    samples = workload.build_samples(components, run)
    first = samples[0].response
    smallest = replace(samples[0], response=Completion(first.token_ids[:1], first.log_probs[:1], finished=False))
    components.sampler.load_weights(components.actor.student, 0)
    prompts = [prompt.tokens for prompt in components.prompts_of(1)]

    def sample() -> None:
        components.sampler.submit(prompts, 0)
        components.sampler.collect()

    components.actor.update_policy([smallest])  # the first step allocates the optimizer's state
    constant, _ = measure_minimum(lambda: components.actor.update_policy([smallest]), repeats)
    training, training_bytes = measure_minimum(lambda: components.actor.update_policy(samples), repeats)
    sampling, sampling_bytes = measure_minimum(sample, repeats)
    return {
        "fixed_seconds": constant,
        "learning_seconds": max(0.0, training - constant),
        "learning_bytes": training_bytes,
        "sampling_seconds": sampling,
        "sampling_bytes": sampling_bytes,
    }


def measure_minimum(call: Callable[[], Any], repeats: int) -> tuple[float, int]:
    """Minimum over several calls of the seconds and of the peak bytes above the resident memory before the call."""
    seconds, peaks = [], []
    for _ in range(repeats):
        before = reset_peak()
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
        peaks.append(read_peak() - before)
    return min(seconds), min(peaks)


def tabulate(axes: list[dict[str, Any]]) -> list[list[Any]]:
    table: list[list[Any]] = []
    for axis in axes:
        for size, point in zip(axis["sizes"], axis["points"], strict=True):
            cells = [point[name] if name.endswith("seconds") else point[name] // 10**6 for name in QUANTITIES]
            table.append([f"{axis['axis']}: {size}", *cells])
        slopes = [axis["exponents"][name] for name in QUANTITIES]
        table.append(["    exponent", *("-" if slope is None else f"{slope:.2f}" for slope in slopes)])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=AXES, metavar="AXIS", help=", ".join(AXES))
    parser.add_argument("--factors", type=int, nargs="+", default=FACTORS, help="two or more factors")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="run a trial with the smallest sizes")
    parser.add_argument("--note", default="", help="other load on the machine; saved with the results")
    options = parser.parse_args()
    keep_freed_memory()
    os.environ["OMP_NUM_THREADS"] = "1"
    base = BASE
    if options.tiny:
        base = replace(base, hidden_size=32, intermediate_size=64, vocab_size=512)
        base = replace(base, num_prompts=1, n=2, response_length=8)
    (kernels,) = run_all(describe_kernels, [()], workers=1)
    axes: list[dict[str, Any]] = []
    for axis in options.axes:
        field = AXES[axis]
        sizes = [getattr(base, field) * factor for factor in options.factors]
        points = [run_all(measure, [(replace(base, **{field: size}), options.repeats)], workers=1)[0] for size in sizes]
        exponents = {
            name: compute_slope([(size, point[name]) for size, point in zip(sizes, points, strict=True)])
            for name in QUANTITIES
        }
        axes.append({"axis": axis, "sizes": sizes, "points": points, "exponents": exponents})
        save("growth", {"note": options.note, "base": vars(base), "kernels": kernels, "measured": axes})
    print_table(
        "Growth of a step with each size",
        ["", "training, s", "training, MB", "sampling, s", "sampling, MB"],
        tabulate(axes),
    )


if __name__ == "__main__":
    main()
