"""The shipped config files: each loads, and its memory table equals the dry run's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sdpo.config.loader import load_config
from sdpo.config.root import iterate_settings
from sdpo.models.memory_estimate import MemoryEstimate
from sdpo.report.dry_run import format_bytes, list_memory

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
SHIPPED = sorted(CONFIGS.rglob("*.yaml"))
GEO3K = sorted(CONFIGS.glob("geo3k_*.yaml"))
ON_VERL = [path for path in GEO3K if path.stem != "geo3k_1gpu"]
# a dry run only reads the model's config.json
MODEL = f"model.path={ROOT / 'tests' / 'golden' / 'qwen2_5_vl_3b'}"


def test_configs_of_make_run_are_shipped() -> None:
    assert {"hidden_rule.yaml", "hidden_rule_grpo.yaml"} <= {path.name for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_config_loads(path: Path) -> None:
    config = load_config(path)
    assert config.output_dir == f"runs/{path.stem}", "a separate folder per config file"


def dry_run(path: Path, *overrides: str, on_verl: bool = False) -> MemoryEstimate:
    config = load_config(path, [MODEL, *overrides])
    if path not in ON_VERL and not on_verl:
        from sdpo.trainer.memory_estimate import MemoryEstimator as NativeEstimator

        return NativeEstimator(config).estimate()
    from sdpo.verl_backend.config.memory_estimate import MemoryEstimator
    from sdpo.verl_backend.config.to_verl import to_verl_overrides

    return MemoryEstimator(config, to_verl_overrides(config).overrides).estimate()


def test_geo3k_has_a_config_per_machine() -> None:
    assert [path.stem for path in GEO3K] == ["geo3k_1gpu", "geo3k_2gpus", "geo3k_2nodes", "geo3k_8gpus"]


@pytest.mark.parametrize("path", GEO3K, ids=lambda path: path.stem)
def test_geo3k_fits_into_80_gb(path: Path) -> None:
    estimate = dry_run(path)
    assert estimate.num_params == 3_754_622_976
    assert max(estimate.actor_peak, estimate.sampler_peak) < 72 * 2**30, (
        "at most 72 of 79.6 GiB, so that CUDA, NCCL and fragmentation have space"
    )


def test_config_for_one_gpu_also_fits_on_verl() -> None:
    estimate = dry_run(CONFIGS / "geo3k_1gpu.yaml", on_verl=True)
    assert estimate.colocated and estimate.actor_peak < 72 * 2**30
    page = (ROOT / "docs" / "geo3k_memory.md").read_text()
    persistent, training = sum(estimate.persistent.values()), sum(estimate.training.values())
    for size in (
        persistent + sum(estimate.sampler.values()),
        persistent + training + max(sum(p.values()) for p in estimate.phases.values()),
    ):
        assert format_bytes(size) in page


@pytest.mark.parametrize("path", GEO3K, ids=lambda path: path.stem)
def test_memory_table_of_a_config_equals_the_dry_run(path: Path) -> None:
    comments = re.findall(r"^#   (\S.*?) +([\d.]+ [KMG]iB)$", path.read_text(), flags=re.MULTILINE)
    assert comments == [(name, format_bytes(size)) for name, size in list_memory(dry_run(path))]
    assert f"configs/{path.name} --dry-run" in path.read_text()


def test_memory_table_of_the_page_equals_the_dry_run() -> None:
    page = (ROOT / "docs" / "geo3k_memory.md").read_text()
    lines = [
        line.strip("| ").split("|") for line in page.splitlines() if re.match(r"\| (at most|actor|sampler)\b", line)
    ]
    (_, *names), *rows = [[cell.strip() for cell in line] for line in lines]
    for column, name in enumerate(names, start=1):
        written = {row[0]: row[column] for row in rows if len(row) > column and row[column]}
        expected = {
            re.sub(r" and sampler| on each of \d+ GPUs", "", item): format_bytes(size)
            for item, size in list_memory(dry_run(CONFIGS / f"{name}.yaml"))
        }
        assert written == expected, name


def test_memory_of_the_full_vocabulary_equals_the_page() -> None:
    page = (ROOT / "docs" / "geo3k_memory.md").read_text().replace("\n", " ")
    path, full = CONFIGS / "geo3k_2gpus.yaml", "self_distillation.distillation_topk=null"
    assert load_config(path).actor.max_tokens_per_micro_batch == 8192
    estimate = dry_run(path, full)
    vocabulary, hidden = 151_936, 2048
    parts = [
        350_000_000,
        10 * 60_000_000,
        6 * vocabulary * hidden,
        2 * vocabulary * hidden,
        (4096 * 2 + 8192 // 2) * hidden * 4,
    ]
    assert estimate.phases["micro-batch"]["logits"] == sum(parts)
    for size in (*parts, sum(parts)):
        assert f"| {format_bytes(size)} |" in page
    assert f"It takes {format_bytes(estimate.actor_peak)} now, as with top-k" in page
    assert f"{format_bytes(sum(estimate.persistent.values()) + sum(estimate.training.values()))} of it" in page
    assert estimate.actor_peak == dry_run(path).actor_peak < 72 * 2**30
    twice = dry_run(path, full, "actor.max_tokens_per_micro_batch=16384")
    assert f"At 16384 tokens per micro-batch the actor takes {format_bytes(twice.actor_peak)}" in page


@pytest.mark.parametrize("path", GEO3K, ids=lambda path: path.stem)
def test_memory_with_successful_rollouts_as_demonstrations(path: Path) -> None:
    overrides = [
        "self_distillation.demonstration_source=successful_rollout_then_ground_truth",
        "self_distillation.max_reprompt_len=4608",
    ]
    assert dry_run(path, *overrides, "eval.evaluate_teacher=false").actor_peak < 72 * 2**30
    assert (dry_run(path, *overrides).actor_peak < 72 * 2**30) == (path in ON_VERL)


@pytest.mark.parametrize(
    ("name", "actors", "samplers"),
    [("geo3k_2gpus", (1, 1), (1, 1)), ("geo3k_8gpus", (1, 4), (1, 4)), ("geo3k_2nodes", (1, 8), (1, 8))],
)
def test_config_composes_for_verl(
    name: str, actors: tuple[int, int], samplers: tuple[int, int], tmp_path: Path
) -> None:
    from sdpo.verl_backend.config.schema import read_self_distillation
    from sdpo.verl_backend.config.to_verl import to_verl_overrides
    from sdpo.verl_backend.entrypoint.compose import compose_config

    for kind in ("train", "test"):
        (tmp_path / f"{kind}.parquet").touch()
    path = CONFIGS / f"{name}.yaml"
    files = [f"data.train_files=[{tmp_path}/train.parquet]", f"data.val_files=[{tmp_path}/test.parquet]"]
    sdpo_config = load_config(path, files)
    translated = to_verl_overrides(sdpo_config)
    config = compose_config(translated.config_name, translated.overrides)
    assert translated.config_name == "sdpo_trainer" and not config.trainer.use_v1, "one step off policy"
    assert (config.trainer.nnodes, config.trainer.n_gpus_per_node) == actors
    assert (config.actor_rollout_ref.rollout.nnodes, config.actor_rollout_ref.rollout.n_gpus_per_node) == samplers
    estimate = dry_run(path)
    assert (estimate.num_actor_gpus, estimate.num_sampler_gpus) == (actors[0] * actors[1], samplers[0] * samplers[1])
    assert read_self_distillation(config.actor_rollout_ref.actor) == sdpo_config.self_distillation
    assert config.actor_rollout_ref.model.path == "Qwen/Qwen2.5-VL-3B-Instruct"
    precision = config.actor_rollout_ref.actor.fsdp_config
    assert precision.mixed_precision.param_dtype == "bf16"
    assert precision.model_dtype == "fp32"
    optim = config.actor_rollout_ref.actor.optim
    adamw_8bit = ("torchao.optim", "AdamW8bit")
    assert (optim.optimizer_impl, optim.optimizer) == (
        adamw_8bit if name == "geo3k_2gpus" else ("torch.optim", "AdamW")
    )


def test_geo3k_configs_differ_only_in_settings_of_the_machine() -> None:
    machine = {"output_dir", "max_staleness", "verl", "optim.name", "actor.max_tokens_per_micro_batch"}
    machine |= {"actor.freeze_vision_tower", "rollout.max_num_seqs", "eval.max_prompts", "tracking.name"}
    first, *others = [OmegaConf.structured(load_config(path)) for path in GEO3K]
    keys = [key for key, _ in iterate_settings() if key not in machine]
    for other in others:
        assert [key for key in keys if OmegaConf.select(first, key) != OmegaConf.select(other, key)] == []
