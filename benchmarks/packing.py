"""Forward and backward pass over the rollouts of one prompt: padded, packed, and packed with a shared prompt.

    python benchmarks/packing.py

Each line is a forward and a backward pass of 2, 8 or 16 rollouts in float32 on one thread, by a random Qwen2 of 5M
parameters without its output layer. Responses have between a quarter of the maximum length and the maximum length. The
three forms alternate in one process; the table has medians. "Predicted" is the cost model's ratio of shared to packed;
the actor chooses a form by this ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from record import print_table, save
from workload import Workload

PROMPTS = (2, 8, 32, 128, 512)
RESPONSE = 64


def measure(model: Any, cost: Any, prompt_length: int, num_rollouts: int, repeats: int) -> dict[str, Any]:
    """Median seconds of each form, and the prediction of the cost model."""
    import random

    import torch

    from sdpo.models.forward import compute_hidden, compute_positions, pad_sequences
    from sdpo.models.multimodal.processor import TokenPrompt
    from sdpo.models.packing.attention_plan import PrefixGroup, count_cost
    from sdpo.models.packing.layout import pack_sequences

    rng, device = random.Random(0), torch.device("cpu")
    prompt = TokenPrompt(rng.choices(range(4096), k=prompt_length))
    responses = [rng.choices(range(4096), k=rng.randint(RESPONSE // 4, RESPONSE)) for _ in range(num_rollouts)]
    prompts = [prompt] * num_rollouts
    positions = compute_positions(prompts, RESPONSE, None)
    lengths = tuple(prompt_length + len(response) for response in responses)
    groups = {
        "apart": [PrefixGroup(0, (length,)) for length in lengths],
        "shared": [PrefixGroup(prompt_length, lengths)],
    }
    rows = {name: pack_sequences(form, prompts, responses, positions, cost, device) for name, form in groups.items()}
    rows["padded"] = pad_sequences(prompts, responses, 0, device)

    def run(name: str) -> None:
        compute_hidden(model, rows[name]).sum().backward()

    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for repeat in range(repeats + 1):
        for name in rows:
            elapsed = _time(lambda name=name: run(name))
            if repeat:
                seconds[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [shared / apart for shared, apart in zip(seconds["shared"], seconds["apart"], strict=True)]
    return {
        "prompt_length": prompt_length,
        "num_rollouts": num_rollouts,
        "tokens": {name: int(row.token_ids.numel()) for name, row in rows.items()},
        "seconds": medians,
        "shared_of_padded": medians["shared"] / medians["padded"],
        "shared_of_apart": statistics.median(ratios),
        "said": count_cost(groups["shared"], cost) / count_cost(groups["apart"], cost),
    }


def _time(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    import torch

    from sdpo.kernels.cpu.fast_linear import speed_up_linear_layers
    from sdpo.models.packing.support import enable_packing

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--hidden", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = Workload(hidden_size=options.hidden, intermediate_size=4 * options.hidden).build_model()
    speed_up_linear_layers(model)
    cost = enable_packing(model)
    measured = [measure(model, cost, length, n, options.repeats) for n in (2, 8, 16) for length in PROMPTS]
    print_table(
        "Milliseconds of a forward and backward pass over the rollouts of one prompt",
        ("rollouts", "prompt", "padded", "packed", "shared", "shared/padded", "shared/packed", "predicted"),
        [
            (
                m["num_rollouts"],
                m["prompt_length"],
                *(1000 * m["seconds"][name] for name in ("padded", "apart", "shared")),
                m["shared_of_padded"],
                m["shared_of_apart"],
                m["said"],
            )
            for m in measured
        ],
    )
    save("packing", {"hidden_size": options.hidden, "measured": measured})


if __name__ == "__main__":
    main()
