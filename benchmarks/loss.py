"""Time and memory of the loss, forward and backward, from hidden states and output layer: ours and alternatives.

    python benchmarks/loss.py                                              # about four hours on one core
    python benchmarks/loss.py --tokens 256 512 --dtypes float32            # minutes
    python benchmarks/loss.py --device cuda --tokens 8192 --hidden 2048 --dtypes bfloat16

    floor      lower bound: four matrix products, 8 N H V operations (logits of student and teacher, gradients by hidden
               states and output layer), with the best of several chunk sizes
    floor, oneDNN   the same products in float32 by oneDNN, where our kernels call oneDNN (AMD processors with AVX-512)
    ours       sdpo.fused_self_distillation_loss
    official   the formula on [1, N, V] log-probabilities of student and teacher, differentiated by autograd
    trl        the functions that TRL's SDPOTrainer calls to compute its loss from logits
    liger      LigerFusedLinearJSDLoss with its defaults, compiled; liger, eager is the same without the compiler

Each line is a separate process with one thread, which alternates with the floor. The time ratio is the median of the
ratios of neighbouring calls. Peak memory is the highest resident set of one loss with its backward pass (on a GPU, the
peak of allocated memory), minus the memory of the inputs (hidden states of both sides [N, H], output layers of both
[V, H], ids, mask) and of the two gradients [N, H] and [V, H]. Half-precision logits are converted to float32 before the
softmax, as TRL's mixed precision does; only Liger does not convert them.

The script skips and marks a line that needs more memory than --memory-gib.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from loss_lines import COMPUTE, SETTINGS, Case, Inputs, build_inputs, run_floor, run_floor_by_onednn
from record import describe_kernels, print_table, read_peak, reset_peak, run_all, save

from sdpo.kernels.cpu.allocator import keep_freed_memory

LINES = ("floor", "floor, oneDNN", "ours", "official", "trl", "liger", "liger, eager")
NEEDS = {"trl": "trl", "liger": "liger_kernel", "liger, eager": "liger_kernel"}
CHUNKS = {"cpu": (64, 128, 256, 512), "cuda": (512, 1024, 2048, 4096, 8192)}  # sizes tried for the floor


def measure(case: Case, chunk: int) -> dict[str, Any]:
    """Measure time and memory of one line in turn with the floor; if it fails, return the reason as ``skipped``."""
    import torch

    torch.set_num_threads(1)
    if case.device == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (case.memory_bytes, case.memory_bytes))
    try:
        return _measure(case, chunk)
    except RuntimeError as error:  # keep one line: a compiler's message may have pages
        message = str(error)
        if re.search("allocate memory|out of memory|Cannot allocate", message):
            return {"skipped": f"needs more than {case.memory_bytes / 2**30:.1f} GiB"}
        return {"skipped": (message.strip() or type(error).__name__).splitlines()[0][:200]}
    except MemoryError:
        return {"skipped": f"needs more than {case.memory_bytes / 2**30:.1f} GiB"}


def _measure(case: Case, chunk: int) -> dict[str, Any]:
    inputs = build_inputs(case)
    floor = partial(run_floor, chunk, inputs)
    if case.line.startswith("floor"):
        products = partial(run_floor_by_onednn, chunk, inputs) if "oneDNN" in case.line else floor
        peak = _find_peak(case, inputs, products)
        pairs = [(_time(case.device, floor), _time(case.device, products)) for _ in range(case.repeats)]
        return _summarize(pairs) | {"peak_bytes": peak}
    losses: list[Any] = []

    def line() -> None:
        inputs.hidden.grad = inputs.head.grad = None
        loss = COMPUTE[case.line](SETTINGS[case.setting], inputs)
        loss.backward()
        losses.append(loss.detach())

    peak = _find_peak(case, inputs, line)
    norms = [float(leaf.grad.float().norm()) for leaf in (inputs.hidden, inputs.head)]
    inputs.hidden.grad = inputs.head.grad = None
    floor()
    pairs = [(_time(case.device, floor), _time(case.device, line)) for _ in range(case.repeats)]
    return _summarize(pairs) | {"peak_bytes": peak, "loss": float(losses[-1]), "gradient_norms": norms}


def _summarize(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Summarize pairs of seconds of the floor and of the line."""
    return {
        "seconds": statistics.median(seconds for _, seconds in pairs),
        "of_floor": statistics.median(seconds / floor_seconds for floor_seconds, seconds in pairs),
    }


def _find_peak(case: Case, inputs: Inputs, step: Callable[[], None]) -> int:
    """Peak bytes of the second call above inputs and gradients; the first call compiles and warms up."""
    import torch

    step()
    inputs.hidden.grad = inputs.head.grad = None
    gradients = (inputs.hidden.numel() + inputs.head.numel()) * inputs.head.itemsize
    if case.device == "cpu":
        before = reset_peak()
        step()
        return max(0, read_peak() - before - gradients)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return max(0, torch.cuda.max_memory_allocated() - before - gradients)


def _time(device: str, step: Callable[[], None]) -> float:
    import torch

    if device == "cpu":
        started = time.perf_counter()
        step()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def choose_chunk(case: Case) -> tuple[int, dict[str, Any]]:
    """Tokens per chunk with the fastest four products, and a description of the kernels that compute the products."""
    import torch

    torch.set_num_threads(1)
    inputs = build_inputs(case)
    seconds = {}
    for chunk in [size for size in CHUNKS[case.device] if size <= case.tokens] or [case.tokens]:
        seconds[chunk] = min(_time(case.device, partial(run_floor, chunk, inputs)) for _ in range(2))
    return min(seconds, key=lambda chunk: seconds[chunk]), describe_kernels()


def has_line(line: str, setting: str) -> bool:
    return not (line.startswith("liger") and setting in ("top 100 with tail", "sampled token"))


def measure_alone(case: Case, chunk: int) -> dict[str, Any]:
    if "oneDNN" in case.line and not _calls_onednn(case):
        return {"skipped": "our loss calls torch's products here"}
    package = NEEDS.get(case.line)
    if package is not None and importlib.util.find_spec(package) is None:
        return {"skipped": f"{package} is not installed"}
    try:
        return run_all(measure, [(case, chunk)], workers=1)[0]
    except BrokenProcessPool:
        return {"skipped": f"the process died with a memory limit of {case.memory_bytes / 2**30:.1f} GiB"}


def _calls_onednn(case: Case) -> bool:
    import torch

    from sdpo.kernels.cpu.onednn import goes_to_onednn

    return goes_to_onednn(torch.empty(0, device=case.device, dtype=getattr(torch, case.dtype)))


def tabulate(rows: list[dict[str, Any]]) -> list[list[Any]]:
    table: list[list[Any]] = []
    for row in rows:
        name = [row["tokens"], row["dtype"], row["setting"], row["line"]]
        if "skipped" in row:
            table.append([*name, row["skipped"], "", ""])
        else:
            table.append([*name, row["seconds"], row["of_floor"], row["peak_bytes"] // 10**6])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--lines", nargs="+", default=list(LINES), choices=LINES)
    parser.add_argument(
        "--settings-tokens", type=int, help="token count at which all divergences are measured; default: the second"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=3, help="calls per line")
    parser.add_argument("--memory-gib", type=float, help="memory of a line's process; default: free memory minus 1 GiB")
    parser.add_argument(
        "--return-memory", action="store_true", help="let glibc return freed memory to the system, in all lines"
    )
    parser.add_argument("--note", default="", help="other load on the machine; saved with the results")
    options = parser.parse_args()
    if not options.return_memory:
        keep_freed_memory()
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    memory = int((options.memory_gib or _find_free_gib(options.device) - 1) * 2**30)
    settings_tokens = options.settings_tokens or options.tokens[min(1, len(options.tokens) - 1)]
    sizes = (options.hidden, options.vocab, options.device, options.repeats, memory)
    results: dict[str, Any] = {
        "note": options.note,
        "vocab_size": options.vocab,
        "hidden_size": options.hidden,
        "device": options.device,
        "repeats": options.repeats,
        "memory_gib": memory / 2**30,
        "floor_chunk": {},
        "measured": [],
    }
    for dtype in options.dtypes:
        trial = Case("floor", "", min(max(CHUNKS[options.device]), max(options.tokens)), dtype, *sizes)
        (chunk, results["kernels"]) = run_all(choose_chunk, [(trial,)], workers=1)[0]
        results["floor_chunk"][dtype] = chunk
        for tokens in options.tokens:
            for setting in list(SETTINGS) if tokens == settings_tokens else ["Jensen-Shannon"]:
                lines = [line for line in options.lines if has_line(line, setting)]
                for line in [line for line in lines if setting == "Jensen-Shannon" or not line.startswith("floor")]:
                    case = Case(line, setting, tokens, dtype, *sizes)
                    row = {key: asdict(case)[key] for key in ("tokens", "dtype", "setting", "line")}
                    results["measured"].append(row | measure_alone(case, chunk))
                    print(*tabulate(results["measured"][-1:])[0], flush=True)
        save("loss" if options.device == "cpu" else "loss_gpu", results)
    print_table(
        f"Loss and gradients, vocabulary {options.vocab}, hidden size {options.hidden}, {options.device}, one thread",
        ["tokens", "dtype", "setting", "line", "seconds", "over the floor", "peak MB"],
        tabulate(results["measured"]),
    )


def _find_free_gib(device: str) -> float:
    if device == "cuda":
        import torch

        return float(torch.cuda.mem_get_info()[0]) / 2**30
    match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), flags=re.MULTILINE)
    assert match is not None
    return int(match[1]) / 2**20


if __name__ == "__main__":
    main()
