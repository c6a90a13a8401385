"""Time, memory and kernel profile of the loss on one GPU, compared with the floor, TRL and Liger in one process.

    python benchmarks/gpu/loss.py                       # two to three minutes on one GPU
    python benchmarks/gpu/loss.py OUT.json table sum    # two of the parts, written to another file
    TRIAL=1 TRITON_INTERPRET=1 python benchmarks/gpu/loss.py OUT.json  # tiny sizes on a CPU, kernels interpreted

The script prints and saves each part when it is done, so that an interrupted run keeps its results:

    accuracy   loss and gradients at 256 tokens and the full vocabulary compared with the portable form in float64
    table      median milliseconds, multiples of the floor, GB above inputs and gradients
    sum        error of the output layer's gradient summed in bfloat16 over the chunks, compared with float32
    variants   both kernels alone at several block sizes, and the complete loss at several chunk sizes
    profile    the twelve operations with the most GPU time
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from loss_lines import COMPUTE, SETTINGS, Case, Inputs, build_inputs, run_floor
from record import RESULTS, describe_machine

from sdpo import SelfDistillationConfig
from sdpo.algorithm.batch import TokenBatch
from sdpo.kernels import dispatch, fused_linear_loss
from sdpo.kernels.chunked_log_probs import LinearHead
from sdpo.kernels.cuda.chunks import Buffer
from sdpo.kernels.cuda.logits_gradient import write_logits_gradient
from sdpo.kernels.cuda.row_statistics import Launch, compute_row_statistics
from sdpo.kernels.cuda.top_k import select_top_ids

TRIAL = bool(os.environ.get("TRIAL"))
DEVICE, HIDDEN, VOCAB = ("cpu", 16, 520) if TRIAL else ("cuda", 2048, 151_936)
TOKENS = (24, 40) if TRIAL else (8192, 32_768)
ACCURACY_TOKENS = 8 if TRIAL else 256
REPEATS = 1 if TRIAL else 5
FLOOR_CHUNKS = (16,) if TRIAL else (1024, 2048, 4096, 8192)
CHUNKS = (8,) if TRIAL else (1024, 1408, 2048, 4096)
VARIANTS = (
    [Launch(128, 4)]
    if TRIAL
    else [
        Launch(4096, 8),
        Launch(4096, 8, 3),
        Launch(2048, 8, 4),
        Launch(2048, 4),
        Launch(4096, 16),
        Launch(8192, 16),
        Launch(8192, 16, 2),
        Launch(8192, 8),
    ]
)
NUM_STATISTICS_READS = {"Jensen-Shannon": 4, "forward KL": 2, "reverse KL": 2, "sampled token": 2}

results: dict[str, Any] = {}


def main() -> None:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    if TRIAL:
        dispatch.has_cuda_kernels = lambda hidden: hidden.dtype != torch.float64
    else:
        properties = torch.cuda.get_device_properties(0)
        print(f"{properties.name}, {properties.multi_processor_count} SMs, torch {torch.__version__}", flush=True)
    results["machine"] = describe_machine()
    parts = [measure_accuracy, measure_table, measure_variants, measure_profile, measure_sum]
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "loss_gpu.json"
    selected = sys.argv[2:]
    for part in parts:
        if selected and part.__name__.removeprefix("measure_") not in selected:
            continue
        started = time.perf_counter()
        print(f"\n== {part.__name__.removeprefix('measure_')}", flush=True)
        try:
            part()
        except Exception as error:  # measure the other parts all the same
            print(f"FAILED {type(error).__name__}: {error}"[:2000], flush=True)
            if TRIAL:
                raise
        free_memory()
        print(f"({time.perf_counter() - started:.1f} s)", flush=True)
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def free_memory() -> None:
    gc.collect()
    if not TRIAL:
        torch.cuda.empty_cache()


def build(tokens: int) -> Inputs:
    return build_inputs(Case("ours", "", tokens, "bfloat16", HIDDEN, VOCAB, DEVICE, REPEATS, 0))


def clear(inputs: Inputs) -> None:
    inputs.hidden.grad = inputs.head.grad = None


def time_once(step: Callable[[], Any]) -> float:
    """Milliseconds of one call."""
    if TRIAL:
        started = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - started)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def measure(step: Callable[[], Any], repeats: int = REPEATS) -> dict[str, float]:
    """Median milliseconds, and peak GB above the memory after a first call, which allocates the gradients."""
    step()
    if TRIAL:
        return {"ms": time_once(step), "gb": 0.0}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    return {"ms": statistics.median(time_once(step) for _ in range(repeats)), "gb": peak / 1e9}


def differentiate(compute: Callable[[Inputs], Any], inputs: Inputs) -> None:
    clear(inputs)
    compute(inputs).backward()


def compute_core(settings: dict[str, Any], chunk_size: int | None, inputs: Inputs) -> Any:
    """Compute the loss as the actors do: without the public function's masks and means."""
    return run_core(dispatch.fused_linear_sdpo_loss, settings, inputs, inputs.hidden, inputs.head, chunk_size).loss


def run_core(
    compute: Callable[..., Any],
    settings: dict[str, Any],
    inputs: Inputs,
    hidden: Any,
    head: Any,
    chunk_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    n = len(inputs.ids)
    weights = torch.full((n,), 1 / n, device=DEVICE, dtype=dtype)
    tokens = TokenBatch(
        inputs.ids, distilled=torch.ones(n, dtype=torch.bool, device=DEVICE), distillation_weights=weights
    )
    teacher = LinearHead(inputs.teacher_hidden, inputs.teacher_head)
    if dtype is not None:
        teacher = replace(teacher, hidden=teacher.hidden.to(dtype), weight=teacher.weight.to(dtype))
    config = SelfDistillationConfig(**settings, is_clip=None)
    return compute(LinearHead(hidden, head), [teacher], tokens, config, chunk_size=chunk_size)


def measure_accuracy() -> None:
    inputs = build(ACCURACY_TOKENS)
    rows = results["accuracy"] = []
    for setting, settings in SETTINGS.items():
        found = {}
        for name, compute, dtype in (
            ("float64", fused_linear_loss.fused_linear_sdpo_loss, torch.float64),
            ("float32", dispatch.fused_linear_sdpo_loss, torch.float32),
            ("bfloat16", dispatch.fused_linear_sdpo_loss, torch.bfloat16),
            ("bfloat16, portable", fused_linear_loss.fused_linear_sdpo_loss, torch.bfloat16),
        ):
            hidden, head = (x.detach().to(dtype).requires_grad_() for x in (inputs.hidden, inputs.head))
            outputs = run_core(compute, settings, inputs, hidden, head, dtype=dtype)
            outputs.loss.backward()
            found[name] = float(outputs.loss), hidden.grad.double(), head.grad.double()
            del outputs, hidden, head
        reference = found.pop("float64")
        for name, (loss, *gradients) in found.items():
            errors = [float((g - w).norm() / w.norm()) for g, w in zip(gradients, reference[1:], strict=True)]
            row = {"setting": setting, "of": name, "loss": loss, "reference": reference[0], "gradient_errors": errors}
            rows.append(row)
            print(
                f"{setting:18} {name:19} loss {loss:.6f} of {reference[0]:.6f}   error of the gradients by hidden "
                f"{errors[0]:.1e} by head {errors[1]:.1e}",
                flush=True,
            )
        del found, reference
        free_memory()


def measure_table() -> None:
    rows = results["table"] = []
    for n in TOKENS:
        inputs = build(n)
        floors = {chunk: measure(partial(run_floor, chunk, inputs))["ms"] for chunk in FLOOR_CHUNKS}
        floor = min(floors.values())
        print(n, "floor by chunk:", {chunk: round(ms, 2) for chunk, ms in floors.items()}, flush=True)
        rows.append({"tokens": n, "line": "floor", "setting": "", "ms": floor, "by_chunk": floors})
        for setting, settings in SETTINGS.items():
            lines: dict[str, Callable[[Inputs], Any]] = {
                "ours": partial(COMPUTE["ours"], settings),
                "ours, as the engines call it": partial(compute_core, settings, None),
            }
            if n == TOKENS[0]:
                lines["trl"] = partial(COMPUTE["trl"], settings)
            if setting == "Jensen-Shannon" and (n == TOKENS[0]):
                lines["liger, eager"] = partial(COMPUTE["liger, eager"], settings)
            for line, compute in lines.items():
                row: dict[str, Any] = {"tokens": n, "line": line, "setting": setting}
                clear(inputs)
                free_memory()
                try:
                    row |= measure(partial(differentiate, compute, inputs))
                    row["of_floor"] = row["ms"] / floor
                    shown = f"{row['ms']:8.2f} ms {row['of_floor']:6.3f} x {row['gb']:6.2f} GB"
                    print(f"{n:6} {setting:18} {line:29} {shown}", flush=True)
                except ImportError as error:
                    row["skipped"] = str(error)
                except (RuntimeError, ValueError, TypeError) as error:
                    row["skipped"] = str(error)[:200]
                    print(f"{n:6} {setting:18} {line:29} {row['skipped']}", flush=True)
                rows.append(row)
        del inputs
        free_memory()


def measure_variants() -> None:
    rows = results["variants"] = []
    n = 16 if TRIAL else 1024
    inputs = build(n)
    student = LinearHead(inputs.hidden.detach(), inputs.head.detach())
    teacher = LinearHead(inputs.teacher_hidden, inputs.teacher_head)
    buffers = [Buffer(part, n, 1.0) for part in (student, teacher)]
    with torch.no_grad():
        logits = [b.multiply(p, slice(None)) for b, p in zip(buffers, (student, teacher), strict=True)]
    size = n * VOCAB * 2 / 1e6
    coefficients = torch.full((3, n), 1e-4, device=DEVICE)
    for setting, alpha in (("Jensen-Shannon", 0.5), ("forward KL", 0.0), ("sampled token", None)):
        row_statistics = compute_row_statistics(*logits, inputs.ids, alpha=alpha)
        for launch in VARIANTS:
            steps = {
                "statistics": (
                    partial(compute_row_statistics, *logits, inputs.ids, alpha=alpha, launch=launch),
                    NUM_STATISTICS_READS[setting],
                )
            }
            if launch.stages == 1:
                steps["gradient"] = (
                    partial(
                        write_logits_gradient,
                        *logits,
                        inputs.ids,
                        row_statistics,
                        coefficients,
                        alpha=alpha,
                        launch=launch,
                    ),
                    2 if alpha is None else 3,
                )
            for kernel, (step, passes) in steps.items():
                try:
                    ms = measure(step, repeats=9)["ms"]
                except Exception as error:  # the variant needs more registers or memory than the GPU has
                    print(kernel, setting, launch, str(error)[:200], flush=True)
                    continue
                rows.append({"kernel": kernel, "setting": setting, "launch": vars(launch), "ms": ms})
                print(
                    f"{kernel:10} {setting:16} {launch.block:5} {launch.num_warps:3} {launch.stages:2} {ms:7.3f} ms "
                    f"{passes * size / ms:7.0f} GB/s",
                    flush=True,
                )
    step = partial(compute_row_statistics, *logits, inputs.ids, group_maxima=True)
    print(f"statistics with group maxima {measure(step, repeats=9)['ms']:.3f} ms", flush=True)
    statistics_ = compute_row_statistics(*logits, inputs.ids, group_maxima=True)
    assert statistics_.group_maxima is not None
    k = 10 if TRIAL else 100
    step = partial(select_top_ids, logits[0], statistics_.group_maxima, k)
    print(f"top {k} {measure(step, repeats=9)['ms']:.3f} ms", flush=True)
    step = partial(logits[0].products.topk, k)
    print(f"torch.topk {k} {measure(step, repeats=3)['ms']:.3f} ms", flush=True)
    del logits, buffers, inputs
    free_memory()
    inputs = build(TOKENS[0])
    for chunk in CHUNKS:
        step = partial(differentiate, partial(compute_core, SETTINGS["Jensen-Shannon"], chunk), inputs)
        ms = measure(step)["ms"]
        rows.append({"kernel": "loss", "setting": "Jensen-Shannon", "chunk": chunk, "ms": ms})
        print(f"complete loss in chunks of {chunk:5} {ms:8.2f} ms", flush=True)


def measure_sum() -> None:
    """Compare the gradient of a bfloat16 output layer with the gradient of a float32 output layer."""
    rows = results["sum"] = []
    for n in TOKENS:
        inputs = build(n)
        in_float32 = inputs.head.detach().float().requires_grad_()
        for head in (inputs.head, in_float32):
            ms = measure(lambda head=head, x=inputs: run_backward(x, head), repeats=3)["ms"]
            print(f"{n:6} JS with the head in {head.dtype} {ms:.2f} ms", flush=True)
        error = float((inputs.head.grad.float() - in_float32.grad).norm() / in_float32.grad.norm())
        rounded = in_float32.grad.bfloat16().float()
        rounding_error = float((rounded - in_float32.grad).norm() / in_float32.grad.norm())
        rows.append({"tokens": n, "error": error, "of_rounding_once": rounding_error})
        print(f"{n:6} sum in bfloat16: error {error:.2e}; rounded once: {rounding_error:.2e}", flush=True)
        del inputs, in_float32, rounded, head
        free_memory()


def run_backward(inputs: Inputs, head: Any) -> None:
    inputs.hidden.grad = head.grad = None
    outputs = run_core(dispatch.fused_linear_sdpo_loss, SETTINGS["Jensen-Shannon"], inputs, inputs.hidden, head)
    outputs.loss.backward()


def measure_profile() -> None:
    from torch.profiler import ProfilerActivity, profile

    inputs = build(TOKENS[0])
    for setting in ("Jensen-Shannon", "top 100 with tail"):
        step = partial(differentiate, partial(compute_core, SETTINGS[setting], None), inputs)
        step()
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if not TRIAL else [ProfilerActivity.CPU]
        with profile(activities=activities) as profiler:
            step()
            if not TRIAL:
                torch.cuda.synchronize()
        averages = profiler.key_averages()
        rows = sorted(averages, key=lambda row: -row.self_device_time_total)[:12]
        total = sum(row.self_device_time_total for row in averages)
        launches = sum(row.count for row in averages if row.self_device_time_total > 0)
        print(f"{setting}: {total / 1e3:.2f} ms on the GPU in {launches} operations", flush=True)
        for row in rows:
            print(f"  {row.self_device_time_total / 1e3:8.3f} ms {row.count:5} {row.key[:110]}", flush=True)
        results[f"profile, {setting}"] = [[row.key, row.count, row.self_device_time_total / 1e3] for row in rows]


if __name__ == "__main__":
    main()
