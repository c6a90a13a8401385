"""Time and memory of a training step compared with TRL's SDPOTrainer: same model, lengths, divergence and teacher.

    python benchmarks/step_trl.py                        # half an hour
    python benchmarks/step_trl.py --vocab 4096 --steps 2 --rounds 1

Both sides train a random Qwen2 of 5.2 million parameters (at a vocabulary of 4,096; tied output layer) on 8 prompts x 8
rollouts of 56 prompt tokens and 64 response tokens. No response ends early. Both use float32, one thread, an EMA
teacher and Jensen-Shannon with alpha 0.5, and distill every sample from the same feedback in the same words, so that
the teacher's prompts have equal lengths. TRL runs forward and backward pass with all 64 samples at once, and with 8 at
a time. Ours splits by tokens: by its default, and by the tokens of 8 samples. Sides alternate, each time in a new
process.

    sampling   the rollouts
    learning   teacher, student, loss, backward pass, optimizer, teacher update
    rest       the remainder of a step

Peak memory is the highest resident set of the process. Memory above imports is the peak minus the resident memory
after the imports: models, optimizer and everything that a step needs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from record import describe_kernels, median_of, print_table, read_peak, reset_peak, run_all, save
from workload import Workload

from sdpo.kernels.cpu.allocator import keep_freed_memory

TOPK = 100
SETTINGS = {"full vocabulary": None, f"top {TOPK} with tail": TOPK}
WARM_UP = 1  # skipped steps
TEMPLATE_LENGTH = 24  # maximum tokens of the template around the feedback


def run_ours(folder: str, workload: Workload, topk: int | None, steps: int, at_once: int | None) -> dict[str, Any]:
    """Medians over the steps, tokens per step and bytes, with ``at_once`` samples per forward pass or the default."""
    import torch

    from sdpo import SDPOTrainer
    from sdpo.report import read_run

    torch.set_num_threads(1)
    imported = reset_peak()
    overrides = ["actor.num_threads=1", f"max_steps={steps + WARM_UP}"]
    if topk is not None:
        overrides.append(f"self_distillation.distillation_topk={topk}")
    if at_once is not None:
        prompts = 2 * workload.prompt_length + workload.feedback_length + TEMPLATE_LENGTH
        overrides.append(f"actor.max_tokens_per_micro_batch={at_once * (prompts + 2 * workload.response_length)}")
    run = workload.load(Path(folder), overrides)
    rows = list(read_run(SDPOTrainer(run).train().output_dir).rows)[WARM_UP:]
    peak = read_peak()
    timings = [
        {
            "sampling": row["timing_s/gen"],
            "learning": row["timing_s/update_actor"],
            "rest": row["timing_s/step"] - row["timing_s/gen"] - row["timing_s/update_actor"],
            "step": row["timing_s/step"],
        }
        for row in rows
    ]
    num_samples = workload.num_prompts * workload.n
    assert all(row["self_distillation/reprompt_sample_fraction"] == 1.0 for row in rows)
    return {
        **median_of(timings),
        "response_tokens": rows[0]["response_length/mean"] * num_samples,
        "teacher_prompt_tokens": _count_teacher_tokens(run, workload),
        "peak_bytes": peak,
        "bytes_above_imports": peak - imported,
    }


def _count_teacher_tokens(run: Any, workload: Workload) -> int:
    from sdpo.observability.progress import NullCallback
    from sdpo.trainer.build import build_components

    samples = workload.build_samples(build_components(run, NullCallback()), run)
    return sum(len(sample.teacher_prompt.token_ids) for sample in samples)


def run_trl(folder: str, workload: Workload, topk: int | None, steps: int, at_once: int) -> dict[str, Any]:
    """Medians, tokens, bytes and the parts of training by TRL, with ``at_once`` samples per forward pass."""
    import pyarrow.parquet as pq
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
    from transformers.utils import logging
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    imported = reset_peak()
    seconds: dict[str, float] = defaultdict(float)  # since the start of the step
    rows: list[dict[str, float]] = []
    tokens: dict[str, int] = {}

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds[part] += time.perf_counter() - started

    class TimedTrainer(SDPOTrainer):
        def _generate(self, prompt_ids: Any) -> Any:
            with timed("sampling"):
                return super()._generate(prompt_ids)

        def _prepare_inputs(self, batch: Any) -> Any:
            with timed("preparing"):
                inputs = super()._prepare_inputs(batch)
            assert bool(inputs["self_distillation_mask"].all())
            return inputs

        def _prepare_training_batch(self, inputs: Any) -> Any:
            batch = super()._prepare_training_batch(inputs)
            length = batch["completion_mask"].shape[1]
            tokens["response_tokens"] = int(batch["completion_mask"].sum())
            tokens["teacher_prompt_tokens"] = int(batch["teacher_attention_mask"][:, :-length].sum())
            return batch

        def _forward_logits(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            with timed("teacher" if model is self.teacher_model else "student"):
                return super()._forward_logits(model, *args, **kwargs)

        def _compute_self_distillation_loss(self, *args: Any, **kwargs: Any) -> Any:
            with timed("loss"):
                return super()._compute_self_distillation_loss(*args, **kwargs)

    class StepTimer(TrainerCallback):
        """Times each step from its start to the start of the next; training ends after the teacher update."""

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.finish()
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds["learning"] = time.perf_counter() - self.started - seconds["preparing"]

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.finish()

        def finish(self) -> None:
            if seconds:
                step = time.perf_counter() - self.started
                rest = step - seconds["sampling"] - seconds["learning"]
                rows.append({**seconds, "rest": rest, "step": step})
                seconds.clear()

    path = Path(folder)
    data = [
        {"prompt": row["prompt"], "privileged_context": row["reward_model"]["ground_truth"]}
        for row in pq.read_table(path / "train.parquet").to_pylist()
    ]
    num_samples = workload.num_prompts * workload.n
    trainer = TimedTrainer(
        model=str(path / "model"),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=SDPOConfig(
            output_dir=str(path / "trl"),
            max_steps=steps + WARM_UP,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=num_samples // at_once,
            num_generations=workload.n,
            max_prompt_length=workload.prompt_length,
            max_completion_length=workload.response_length,
            distillation_mode="full_logits" if topk is None else "topk_logits",
            distillation_topk=topk,
            distillation_add_tail=True,
            distillation_alpha=0.5,
            teacher_model_kind="ema",
            include_environment_feedback=True,
            model_init_kwargs={"dtype": "float32"},
            learning_rate=1e-5,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            diagnostics_warning_interval=0,  # every score is 0 on purpose
        ),
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(path / "model"),
        callbacks=None,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(StepTimer())  # runs last, after the callback that updates the teacher
    backward = trainer.accelerator.backward

    def timed_backward(*args: Any, **kwargs: Any) -> None:
        with timed("backward"):
            backward(*args, **kwargs)

    trainer.accelerator.backward = timed_backward
    trainer.train()
    peak = read_peak()
    return {**median_of(rows[WARM_UP:]), **tokens, "peak_bytes": peak, "bytes_above_imports": peak - imported}


def prepare(folder: str, workload: Workload) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    workload.write(Path(folder))
    return describe_kernels()


def compare(folder: str, workload: Workload, topk: int | None, options: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds by side, and ratios to our run with the same number of samples at once."""
    num_samples = workload.num_prompts * workload.n
    eighth = max(1, num_samples // 8)
    sides: dict[str, Any] = {
        "ours": (run_ours, None, None),
        f"TRL, {num_samples} at once": (run_trl, num_samples, "ours"),
        f"ours, {eighth} at once": (run_ours, eighth, None),
        f"TRL, {eighth} at once": (run_trl, eighth, f"ours, {eighth} at once"),
    }
    measured: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side, (run, at_once, _) in sides.items():
            measured[side] += run_all(run, [(folder, workload, topk, options.steps, at_once)], workers=1)
    result = {}
    for side, (_, _, our_side) in sides.items():
        result[side] = median_of(measured[side])
        if our_side is not None:
            result[side]["ours_over_it"] = {
                name: statistics.median(
                    ours[name] / other[name] for ours, other in zip(measured[our_side], measured[side], strict=True)
                )
                for name in ("step", "sampling", "learning", "peak_bytes", "bytes_above_imports")
            }
    return result


def tabulate(measured: list[dict[str, Any]]) -> list[list[Any]]:
    table: list[list[Any]] = []
    for row in measured:
        for side, m in row["sides"].items():
            ratios = m.get("ours_over_it")
            cells = [ratios["step"], ratios["bytes_above_imports"]] if ratios else ["", ""]
            table.append(
                [
                    f"{row['vocab_size']}, {row['setting']}: {side}",
                    *(m[part] for part in ("sampling", "learning", "rest", "step")),
                    round(m["peak_bytes"] / 10**6),
                    round(m["bytes_above_imports"] / 10**6),
                    *cells,
                ]
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[4096, 32_768])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("-n", type=int, default=8, help="rollouts per prompt")
    parser.add_argument("--response", type=int, default=64, help="tokens per response")
    parser.add_argument("--steps", type=int, default=3, help="measured steps per process")
    parser.add_argument("--rounds", type=int, default=3, help="processes per side")
    parser.add_argument(
        "--return-memory", action="store_true", help="let glibc return freed memory to the system, on all sides"
    )
    parser.add_argument("--note", default="", help="other load on the machine; saved with the results")
    options = parser.parse_args()
    if not options.return_memory:
        keep_freed_memory()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    measured: list[dict[str, Any]] = []
    for vocab_size in options.vocab:
        workload = Workload(
            vocab_size=vocab_size, num_prompts=options.prompts, n=options.n, response_length=options.response
        )
        with tempfile.TemporaryDirectory() as folder:
            (kernels,) = run_all(prepare, [(folder, workload)], workers=1)
            for setting, topk in SETTINGS.items():
                sides = compare(folder, workload, topk, options)
                measured.append({"vocab_size": vocab_size, "setting": setting, "sides": sides})
        results = {"note": options.note, "options": vars(options), "kernels": kernels}
        save("step_trl", results | {"measured": measured})
    print_table(
        f"Seconds per step of {options.prompts} x {options.n} rollouts, and MB: peak, above imports, ours / TRL",
        ["", "sampling", "learning", "rest", "step", "peak", "above", "time", "memory"],
        tabulate(measured),
    )


if __name__ == "__main__":
    main()
