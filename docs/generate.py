"""Write the documentation pages that are generated from the code; ``--check`` exits 1 if a page is stale."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from sdpo.config.field import describe_range
from sdpo.config.root import iterate_settings
from sdpo.observability import metrics
from sdpo.verl_backend.compat.hooks import HOOKS, VERL_VERSION

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "src" / "sdpo"
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS", DOCS.parent / "benchmarks" / "results"))

CONFIGURATION = """\
# Configuration

A config file is YAML; `key=value` on the command line overrides it, with the dotted keys below. An unknown key, a wrong
type and a value out of range are refused with one line. A key of an earlier version is refused with its new name.
`null` means "not set".
"""

METRICS = """\
# Metrics

Every step appends one line to `metrics.jsonl` in the output folder. Names follow verl where verl has the quantity; the
metrics of SDPO begin with `self_distillation/`, those of the [health checks](health.md) with `health/`.

Estimates have a 95 % confidence interval, `NAME/ci95_low` and `NAME/ci95_high`: {estimates}, and all validation
accuracies. A prompt counts as one observation, however many rollouts and tokens it has. The interval of a mean is the
mean -+ 1.96 standard errors; the interval of a fraction is Wilson's. On verl only
`self_distillation/rollout_success_fraction`, `self_distillation/success_group_fraction` and
`self_distillation/reprompt_sample_fraction` have an interval.

`sdpo report` also reads runs written under earlier names; the last table lists them.
"""


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def type_of(field: dataclasses.Field[object]) -> str:
    name, optional, _ = str(field.type).partition(" | None")
    return f"`{name}`" + (" or null" if optional else "")


def default_of(field: dataclasses.Field[object]) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return "mandatory" if value == MISSING else f"`{json.dumps(value)}`"


def configuration() -> str:
    page = CONFIGURATION
    settings = [(key.rpartition(".")[0], key, field) for key, field in iterate_settings()]
    for section, members in groupby(settings, key=lambda setting: setting[0]):
        rows = (
            (
                f"`{key}`",
                type_of(field),
                default_of(field),
                describe_range(field.metadata),
                field.metadata["help"],
            )
            for _, key, field in members
        )
        page += f"\n## {section or 'Top level'}\n\n" + table(("Key", "Type", "Default", "Range", "Meaning"), rows)
    return page


def metric_names() -> str:
    page = METRICS.format(estimates=", ".join(f"`{name}`" for name in metrics.ESTIMATES))
    for family, members in groupby(metrics.DESCRIPTIONS.items(), key=lambda item: item[0].split("/")[0]):
        rows = ((f"`{name}`", meaning) for name, meaning in members)
        page += f"\n## {family}\n\n" + table(("Name", "Meaning"), rows)
    validation = {
        "val-core": {
            metrics.val_name("DATA_SOURCE", "mean@1"): "Accuracy of the student, one greedy response per prompt.",
            metrics.val_name("DATA_SOURCE", "mean@N"): "Mean accuracy over `eval.n` = N sampled responses per prompt; "
            "only if N > 0.",
            metrics.val_name("DATA_SOURCE", "best@N/mean"): "Mean over prompts of the best of the N scores (pass@N).",
        },
        "val-teacher": {
            metrics.teacher_val_name("DATA_SOURCE", "mean@1"): "Accuracy of the teacher on the prompts with a "
            "demonstration or feedback, one greedy response each.",
            metrics.teacher_prompted_name("DATA_SOURCE"): "Fraction of prompts with a demonstration or feedback.",
            metrics.teacher_gain_name(
                "DATA_SOURCE"
            ): "Teacher minus student on these prompts, one greedy response each.",
        },
    }
    for family, meanings in validation.items():
        page += f"\n## {family}\n\n" + table(
            ("Name", "Meaning"), ((f"`{name}`", meaning) for name, meaning in meanings.items())
        )
    renamed = {
        **metrics.RENAMED_METRICS,
        "val-teacher/DATA_SOURCE/gain/mean@1": metrics.teacher_gain_name("DATA_SOURCE"),
    }
    page += "\n## Earlier names\n\n" + table(
        ("Earlier", "Now"), ((f"`{old}`", f"`{new}`") for old, new in renamed.items())
    )
    return page + (
        f"\nIn runs with `self_distillation/distilled_sample_fraction`, `{metrics.SUCCESS_SAMPLE_FRACTION}` had the "
        f"meaning of `{metrics.ROLLOUT_SUCCESS_FRACTION}`, and `sdpo report` reads it as such.\n"
    )


HOOKS_PAGE = """\
# Hooks into verl

The non-public parts of verl {version} that `src/sdpo/verl_backend` depends on. The extra `sdpo[verl]` installs exactly
this version. `tests/unit/verl_backend/test_hooks.py` compares the source of each hook with a recorded fingerprint and
names the hooks that changed.

"""


def verl_hooks() -> str:
    rows = ((f"`{hook.where.replace(':', '` `')}`", hook.how, hook.why) for hook in HOOKS)
    return HOOKS_PAGE.format(version=VERL_VERSION) + table(("Where", "How", "Why"), rows)


PERFORMANCE = """\
# Performance

Time and memory, compared with a lower bound and with other implementations. `docs/generate.py` makes every table from
`benchmarks/results/*.json`; the command above a table repeats the measurement. `benchmarks/notes.md` lists
optimization attempts.

Ratios are medians of interleaved measurements, in one process or in alternating processes, each with one thread. TRL
and Liger come with the extra `bench`, on Python 3.11 or 3.12; lines whose package is missing are skipped:

```bash
pip install torch==2.13.0                # where there is no GPU: --index-url https://download.pytorch.org/whl/cpu
pip install -c constraints.txt -e '.[bench]'
```
"""

LOSS = """\
The loss alone, from hidden states and output layers to the gradients of both. Memory is in addition to inputs and
gradients.

- **floor**: the four matrix products that every implementation needs, by torch.
- **floor, oneDNN**: the same in float32 by oneDNN, which our products use on AMD processors with AVX-512, where torch
  uses MKL. So there ours is below the floor of all others.
- **ours**: `sdpo.fused_self_distillation_loss`.
- **official**: the paper's formula on log-probabilities [1, N, V] of both sides, by autograd.
- **trl**: the functions of TRL's `SDPOTrainer`.
- **liger**: `LigerFusedLinearJSDLoss` with its defaults, compiled; **liger, eager**: without the compiler.

Target at 1,024 tokens: at most 1.15 times the floor in float32 and 1.3 times in bfloat16, and a twentieth of the
official formula's memory. In all lines glibc keeps freed memory, as in `sdpo train`, which is faster and takes more
memory. With `--return-memory` ours is at a twentieth, and 1.45 times the floor in bfloat16.
"""

LOSS_GPU = """\
The same on one GPU in bfloat16, at a hidden size of 2,048 and a vocabulary of 151,936. **ours, as the engines call it**
is `sdpo.kernels.dispatch.fused_linear_sdpo_loss`, without the masks and means of the public function.

Targets: at most 1.25 times the floor for complete distributions, 1.15 for the sampled token and 1.5 for the top k; at
most 1 GB above inputs and gradients at any number of tokens.

Memory traffic of the kernels between the products at 8,192 tokens, computed; a pass is one read or write of a matrix of
logits, 2.49 GB. For comparison, the four products take 29.2 ms on an H200 (measured), whose memory bandwidth is 4.8
TB/s (data sheet).

| Divergence | First kernel reads | Second reads and writes | GB | ms at 4.8 TB/s |
| --- | --- | --- | --- | --- |
| Jensen-Shannon | 4 passes | 3 passes | 17.4 | 3.6 |
| forward KL, reverse KL | 2 passes | 3 passes | 12.4 | 2.6 |
| top k, sampled token | 2 passes | 2 passes | 10.0 | 2.1 |
"""

STEP_TRL = """\
A complete step compared with TRL's `SDPOTrainer`: sampling, teacher, student, loss, backward pass, optimizer, teacher
update. Both train one random Qwen2 of 5.2 million parameters with the same prompts, lengths, divergence and EMA
teacher, in float32. Peak memory is the highest resident set of the process; its ratio is of the memory above the
imports. Each side runs forward and backward pass with all rollouts at once (ours: as many as its default allows) and
with 8.

Target: at most 0.5 times TRL's time and 0.4 times its memory.
"""

GROWTH = """\
Time and memory of a step as one size grows over three octaves and the others are constant: exponents over the last two
octaves, after the constant part is subtracted. 1 is linear.

Target: no exponent above 1 in tokens or vocabulary.
"""

STARTUP = """\
Seconds from the start of the process; model and data exist already.
"""

GPU_STEP = """\
`Actor.update_policy` on a step's rollouts on one GPU: a random Qwen2.5 in bfloat16, full vocabulary, EMA teacher.
Utilisation is the model's operations per second over those of large matrix products on the same GPU in the same run.
"""

OVERLAP = """\
Time of a step over the longer of sampling and training. With staleness 0 both alternate, with staleness 1 they run at
the same time; 1.00 is perfect overlap.
"""

SAMPLING = """\
Sampling compared with transformers' `generate`: 64 rollouts of 64 tokens of a random Qwen2 of 5.2 million parameters,
float32. The bare forward passes are the lower bound.
"""

PACKING = """\
Forward and backward pass over the rollouts of one prompt: padded, packed without padding, and packed with a shared
prompt. "Predicted" is the ratio of shared to packed by the cost model that decides.
"""

VISION_TOWER = """\
Time of a step whose vision tower runs once per sequence, over the time of a step whose vision tower runs once per step;
one image per prompt.
"""


def loss_table(results: Mapping[str, Any]) -> str:
    measured = results["measured"]
    ours = {row_key(row): row for row in measured if row["line"] == "ours" and "skipped" not in row}
    rows = []
    for row in measured:
        name = (f"{row['tokens']:,}", row["dtype"], row["setting"], row["line"])
        if "skipped" in row:
            rows.append((*name, row["skipped"], "", "", "", ""))
            continue
        other = ours.get(row_key(row))
        ratios = ("", "")
        if other is not None and row["line"] != "ours" and not row["line"].startswith("floor"):
            ratios = (ratio(row["of_floor"], other["of_floor"]), ratio(row["peak_bytes"], other["peak_bytes"]))
        rows.append((*name, f"{row['seconds']:.3g}", f"{row['of_floor']:.2f}", megabytes(row["peak_bytes"]), *ratios))
    sizes = f"Vocabulary {results['vocab_size']:,}, hidden size {results['hidden_size']:,}.\n\n"
    columns = ("Tokens", "Type", "Divergence", "Line", "Seconds", "Over the floor", "Peak MB")
    return sizes + table((*columns, "Its time / ours", "Its memory / ours"), rows)


def loss_gpu_table(results: Mapping[str, Any]) -> str:
    rows = []
    for row in results["table"]:
        name = (f"{row['tokens']:,}", row["setting"], row["line"])
        if "skipped" in row:
            rows.append((*name, row["skipped"], "", ""))
            continue
        memory = f"{row['gb']:.2f}" if "gb" in row else ""
        rows.append((*name, f"{row['ms']:.1f}", f"{row.get('of_floor', 1.0):.2f}", memory))
    return table(("Tokens", "Divergence", "Line", "ms", "Over the floor", "GB"), rows)


def row_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["tokens"], row["dtype"], row["setting"]


def ratio(value: float, other: float) -> str:
    return f"{value / other:.2f}" if other else ""


def megabytes(value: float) -> str:
    return f"{value / 10**6:,.0f}"


def step_trl_table(results: Mapping[str, Any]) -> str:
    rows = []
    for entry in results["measured"]:
        for side, m in entry["sides"].items():
            ratios = m.get("ours_over_it")
            rows.append(
                (
                    f"{entry['vocab_size']:,}, {entry['setting']}",
                    side,
                    *(f"{m[part]:.2f}" for part in ("sampling", "learning", "rest", "step")),
                    megabytes(m["peak_bytes"]),
                    *((f"{ratios['step']:.2f}", f"{ratios['bytes_above_imports']:.2f}") if ratios else ("", "")),
                )
            )
    parts = ("Sampling, s", "Training, s", "Rest, s", "Step, s", "Peak MB")
    sides = results["measured"][0]["sides"].values()
    tokens = " and ".join(sorted({f"{m['teacher_prompt_tokens']:,.0f}" for m in sides}))
    return (
        table(("Vocabulary, loss", "", *parts, "Our time / its", "Our memory / its"), rows)
        + f"\nThe teacher's prompts have {tokens} tokens per step on either side.\n"
    )


def growth_table(results: Mapping[str, Any]) -> str:
    names = ("learning_seconds", "learning_bytes", "sampling_seconds", "sampling_bytes")
    rows = []
    for axis in results["measured"]:
        slopes = (axis["exponents"][name] for name in names)
        cells = ("-" if slope is None else f"{slope:.2f}" for slope in slopes)
        rows.append((axis["axis"].replace(" a ", " per "), f"{axis['sizes'][0]:,} to {axis['sizes'][-1]:,}", *cells))
    return table(("Size", "From, to", "Training, time", "memory", "Sampling, time", "memory"), rows)


def startup_table(results: Mapping[str, Any]) -> str:
    rows = (
        (f"`{line}`", f"{m['seconds']:.2f}", f"{m['slowest']:.2f}", f"below {m['target']:g}" if m["target"] else "")
        for line, m in results["measured"].items()
    )
    return table(("", "Median", f"Slowest of {results['repeats']}", "Target"), rows)


def gpu_step_table(results: Mapping[str, Any]) -> str:
    rows = (
        (
            f"{m['model']} ({m['parameters'] / 1e9:.2f} billion parameters)",
            f"{m['seconds']:.2f}",
            f"{m['tokens_a_second']:,.0f}",
            f"{m['operations_a_second'] / 1e12:.1f}",
            f"{m['product_operations_a_second'] / 1e12:.1f}",
            f"{m['utilisation']:.2f}",
            f"{m['peak_bytes'] / 1e9:.1f}",
        )
        for m in results["measured"]
    )
    columns = ("Model", "Seconds", "Tokens per second", "TFLOP/s", "Products, TFLOP/s", "Utilisation", "Peak GB")
    return table(columns, rows)


def overlap_table(results: Mapping[str, Any]) -> str:
    rows = (
        (f"staleness {i}", *(f"{m[part]:.2f}" for part in ("sampling", "learning", "step", "ratio")))
        for i, m in ((i, results[f"staleness_{i}"]) for i in (0, 1))
    )
    return table(("", "Sampling, s", "Training, s", "Step, s", "Step / longer"), rows)


def sampling_table(results: Mapping[str, Any]) -> str:
    rows = (
        (f"{int(vocabulary):,}", name.replace("_", " "), f"{m['median']:.2f}", f"{m['over_generate']:.2f}")
        for vocabulary, ways in results.items()
        if vocabulary.isdigit()
        for name, m in ways.items()
    )
    return table(("Vocabulary", "", "Seconds", "Fraction of generate"), rows)


def packing_table(results: Mapping[str, Any]) -> str:
    rows = (
        (
            str(m["num_rollouts"]),
            str(m["prompt_length"]),
            *(f"{1000 * m['seconds'][way]:,.0f}" for way in ("padded", "apart", "shared")),
            *(f"{m[name]:.2f}" for name in ("shared_of_padded", "shared_of_apart", "said")),
        )
        for m in results["measured"]
    )
    columns = ("Rollouts", "Prompt tokens", "Padded, ms", "Packed, ms", "Shared, ms")
    return table((*columns, "Shared / padded", "Shared / packed", "Predicted"), rows)


def updates_table(results: Mapping[str, Any]) -> str:
    header = ("Weights, moments", "beta2", "Cosine", "Length", "Weights changed", "Update lost", "Bytes per parameter")
    return table(
        header,
        (
            (
                row["way"],
                f"{row['beta2']:g}",
                f"{row['cosine']:.3f}",
                f"{row['length']:.2f}",
                f"{row['moved']:.1%}",
                f"{row['lost']:.0%}" if row["lost"] else "",
                f"{row['bytes']:.1f}",
            )
            for row in results["rows"]
        ),
    )


def vision_tower_table(results: Mapping[str, Any]) -> str:
    parts = ("sampling", "learning", "step")
    rows = (
        (f"tower {tower}", *(f"{results[tower]['ratios'][part]:.2f}" for part in parts))
        for tower in ("trained", "frozen")
    )
    return table(("", "Sampling", "Training", "Step"), rows)


UPDATES = """\
Weight changes with each combination of data types, compared with float32 ([Numerical precision](precision.md)).
SmolLM2-135M-Instruct learns capitals by SDPO: 100 steps of 4 prompts and 2 rollouts at a learning rate of 1e-5, with a
warm-up of 10 steps. Copies of the layers 0, 15 and 29 get the same clipped gradients and learning rates, each through a
separate optimizer. Cosine and length compare the total change of the weights with float32's at the same second beta.
Bytes are of weight, gradient and moments.
"""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A section of the page: results file, title, text, command, and the function that builds the table."""

    name: str
    title: str
    text: str
    command: str
    tabulate: Callable[[Mapping[str, Any]], str]


MEASUREMENTS: Sequence[Measurement] = (
    Measurement("loss", "The loss, on a CPU", LOSS, "benchmarks/loss.py", loss_table),
    Measurement(
        "loss_gpu",
        "The loss, on a GPU",
        LOSS_GPU,
        "benchmarks/gpu/loss.py",
        loss_gpu_table,
    ),
    Measurement("step_trl", "A step compared with TRL", STEP_TRL, "benchmarks/step_trl.py", step_trl_table),
    Measurement("sampling", "Sampling", SAMPLING, "benchmarks/sampling.py", sampling_table),
    Measurement("packing", "Shared prompts", PACKING, "benchmarks/packing.py", packing_table),
    Measurement("gpu_step", "Training on a GPU", GPU_STEP, "benchmarks/gpu_step.py", gpu_step_table),
    Measurement("growth", "Growth", GROWTH, "benchmarks/growth.py", growth_table),
    Measurement("startup", "Start-up", STARTUP, "benchmarks/startup.py", startup_table),
    Measurement("overlap", "Overlap of sampling and training", OVERLAP, "benchmarks/overlap.py", overlap_table),
    Measurement("updates", "Numerical precision", UPDATES, "benchmarks/updates.py", updates_table),
    Measurement("vision_tower", "Images", VISION_TOWER, "benchmarks/vision_tower.py", vision_tower_table),
)


def performance() -> str:
    page = PERFORMANCE
    for part in MEASUREMENTS:
        page += f"\n## {part.title}\n\n{part.text}\n```bash\npython {part.command}\n```\n\n"
        path = RESULTS / f"{part.name}.json"
        if not path.is_file():
            page += "Not measured yet.\n"
            continue
        results = json.loads(path.read_text(encoding="utf-8"))
        page += f"{part.tabulate(results)}\n{describe_origin(results)}\n"
    return page


def describe_origin(results: Mapping[str, Any]) -> str:
    """Date, machine and versions of a measurement."""
    machine = results["machine"]
    where = machine["processor"] if machine["device"] == "cpu" else f"{machine['device']}, {machine['processor']}"
    packages = ("python", "torch", "transformers", "trl", "liger_kernel")
    versions = ", ".join(f"{name.replace('_', '-')} {machine[name]}" for name in packages if name in machine)
    note = f" {results['note'].rstrip('.')}." if results.get("note") else ""
    return f"{machine['date']}; {where}, {machine['cores']} cores; {versions}.{note}"


def architecture() -> str:
    """The page with the current file tree."""
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    before, _, rest = page.partition("<!-- files -->\n")
    after = rest.partition("<!-- /files -->")[2]
    return f"{before}<!-- files -->\n```text\n{list_files(PACKAGE)}```\n<!-- /files -->{after}"


def list_files(folder: Path, depth: int = 0) -> str:
    """One line per file or package, with the first line of its docstring; packages first."""
    tree = ""
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_file(), path.name)):
        source = path / "__init__.py" if path.is_dir() else path
        if source.suffix != ".py" or not source.is_file() or path.name == "__init__.py":
            continue
        docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
        name = "  " * depth + path.name + ("/" if path.is_dir() else "")
        tree += f"{name:32}{docstring.partition(chr(10))[0]}".rstrip() + "\n"
        if path.is_dir():
            tree += list_files(path, depth + 1)
    return tree


PAGES = {
    "architecture.md": architecture,
    "configuration.md": configuration,
    "metrics.md": metric_names,
    "performance.md": performance,
    "verl_hooks.md": verl_hooks,
}


def main(arguments: list[str]) -> int:
    stale = [DOCS / name for name, build in PAGES.items() if _read(DOCS / name) != build()]
    if "--check" in arguments:
        for path in stale:
            print(f"{path} is stale; run python docs/generate.py")
        return bool(stale)
    for path in stale:
        path.write_text(PAGES[path.name](), encoding="utf-8")
    return 0


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
