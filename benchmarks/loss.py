"""The loss alone, forward and backward: from hidden states in chunks, against the logits of all tokens and autograd.

    python benchmarks/loss.py                                    # under two minutes on a processor
    python benchmarks/loss.py --tokens 4096 --vocab 151936 --hidden 1024

The floor is what no implementation can do without: four matrix products, 8 N H V operations (logits of student and
teacher, gradients by hidden states and head). Each line is a process of its own on one thread, one after the other:
peak memory is what that process had resident at most, less what it had with the inputs made; at the default size one
chunk holds all tokens, so that it says little there.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from typing import Any

from record import print_table, run_all, save

LINES = ("floor", "fused", "materialised")
SETTINGS: dict[str, dict[str, Any]] = {
    "forward KL": {"alpha": 0.0},
    "reverse KL": {"alpha": 1.0},
    "Jensen-Shannon": {"alpha": 0.5},
    "top 100 with tail": {"alpha": 0.5, "distillation_topk": 100},
    "sampled token": {"alpha": 1.0, "full_logit_distillation": False},
}


def measure(
    line: str, setting: str, num_tokens: int, vocab_size: int, hidden_size: int, repeats: int
) -> dict[str, Any]:
    """Median seconds and peak bytes of one loss with its backward pass."""
    import torch

    from sdpo import SelfDistillationConfig

    torch.set_num_threads(1)
    torch.manual_seed(0)
    student, teacher = torch.randn(num_tokens, hidden_size), torch.randn(num_tokens, hidden_size)
    head = torch.randn(vocab_size, hidden_size).div_(hidden_size**0.5)  # in place: nothing freed may hide in the peak
    ids = torch.randint(vocab_size, (num_tokens,))
    config = SelfDistillationConfig(**SETTINGS[setting], is_clip=None)
    step = {"floor": _floor, "fused": _fused, "materialised": _materialised}[line]
    before = _peak()
    seconds = []
    for _ in range(repeats + 1):
        leaves = student.clone().requires_grad_(), head.detach().requires_grad_()
        start = time.perf_counter()
        step(*leaves, teacher, ids, config)
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[1:]), "peak_bytes": _peak() - before}


def _floor(hidden: Any, head: Any, teacher: Any, ids: Any, config: Any) -> None:
    import torch

    from sdpo.algorithm.fused import choose_chunk_size

    size = choose_chunk_size(len(head), head.dtype)
    with torch.no_grad():
        by_head = torch.zeros_like(head)
        for some, shown in zip(hidden.split(size), teacher.split(size), strict=True):
            logits = torch.mm(some, head.T)
            torch.mm(shown, head.T, out=logits)
            torch.mm(logits, head)
            by_head.addmm_(logits.T, some)


def _fused(hidden: Any, head: Any, teacher: Any, ids: Any, config: Any) -> None:
    import torch

    from sdpo import fused_self_distillation_loss

    fused_self_distillation_loss(hidden, head, teacher, head, ids, torch.ones(len(ids)), config)[0].backward()


def _materialised(hidden: Any, head: Any, teacher: Any, ids: Any, config: Any) -> None:
    import torch

    from sdpo.algorithm.inputs import build_loss_inputs
    from sdpo.algorithm.loss import compute_loss

    with torch.no_grad():
        teacher_log_probs = (teacher @ head.T).log_softmax(-1)
    inputs, _ = build_loss_inputs(
        (hidden @ head.T).log_softmax(-1),
        ids,
        config,
        distilled=torch.ones(len(ids), dtype=torch.bool),
        teacher=teacher_log_probs,
        distillation_weights=torch.full((len(ids),), 1.0 / len(ids)),
    )
    compute_loss(inputs, config).loss.backward()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--note", default="", help="what else ran on the machine; kept with the numbers")
    chosen = parser.parse_args()
    sizes = (chosen.tokens, chosen.vocab, chosen.hidden)
    pairs = [("floor", "forward KL"), *((line, setting) for setting in SETTINGS for line in LINES[1:])]
    measured = [run_all(measure, [(*pair, *sizes, chosen.repeats)], workers=1)[0] for pair in pairs]
    floor = measured[0]["seconds"]
    print_table(
        f"Loss and gradients of {sizes[0]} tokens, vocabulary {sizes[1]}, hidden size {sizes[2]}, float32, one thread",
        ("", "seconds", "of the floor", "peak MB"),
        [
            (
                line if line == "floor" else f"{setting}, {line}",
                m["seconds"],
                m["seconds"] / floor,
                m["peak_bytes"] // 10**6,
            )
            for (line, setting), m in zip(pairs, measured, strict=True)
        ],
    )
    rows = [{"line": line, "setting": setting, **m} for (line, setting), m in zip(pairs, measured, strict=True)]
    names = ("tokens", "vocab_size", "hidden_size")
    save("loss", {"note": chosen.note, **dict(zip(names, sizes, strict=True)), "measured": rows})


if __name__ == "__main__":
    main()
