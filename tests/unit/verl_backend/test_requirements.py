"""Checks of devices and packages before Ray starts, on mocked machines."""

from __future__ import annotations

import importlib.util
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from transformers import Qwen2Config, Qwen3Config

from sdpo import c_compiler
from sdpo.config.actor import OptimConfig
from sdpo.errors import SDPOError
from sdpo.models import optimizer
from sdpo.models.optimizer import build_optimizer, require_compiler
from sdpo.rewards.toy import figures, hidden_rule
from sdpo.verl_backend.entrypoint import requirements
from sdpo.verl_backend.entrypoint.compose import compose_config
from sdpo.verl_backend.entrypoint.model_checks import check_head_size

MODEL, ROLLOUT, OPTIM = "actor_rollout_ref.model", "actor_rollout_ref.rollout", "actor_rollout_ref.actor.optim"
EVERYTHING = {"vllm", "cupy", "torch"}


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Callable[..., None]:
    """Return a function that checks a run on a machine with this many GPUs and these packages."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(requirements, "read_ray_address", lambda: None)
    for name in ("train", "test"):
        (tmp_path / f"{name}.parquet").touch()
    files = [f"data.{kind}_files={tmp_path}/{name}.parquet" for kind, name in (("train", "train"), ("val", "test"))]

    def run(*overrides: str, name: str = "sdpo_trainer", num_gpus: int = 2, without: str = "") -> None:
        config: DictConfig = compose_config(name, [*files, "trainer.device=cuda", *overrides])
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(optimizer, "find_missing_compiler", lambda: without if without == "a compiler" else None)
        installed = EVERYTHING - {without}
        monkeypatch.setattr(importlib.util, "find_spec", lambda package: package if package in installed else None)
        requirements.check_machine(config)

    return run


@pytest.mark.parametrize(
    ("name", "num_gpus", "overrides"),
    [
        ("sdpo_trainer", 2, ()),
        ("sdpo_separate_async", 2, ()),
        ("sdpo_sync", 1, ()),
        ("sdpo_trainer", 8, ("trainer.n_gpus_per_node=4", "rollout.n_gpus_per_node=4")),
        ("sdpo_trainer", 2, (f"{OPTIM}.optimizer_impl=torchao.optim",)),
    ],
)
def test_sufficient_machine_is_accepted(
    check: Callable[..., None], name: str, num_gpus: int, overrides: tuple[str, ...]
) -> None:
    check(*overrides, name=name, num_gpus=num_gpus)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"num_gpus": 1},
            r"needs 2 GPUs \(1 for training, 1 for sampling\), and this machine has 1; .* max_staleness=0",
        ),
        ({"num_gpus": 0, "name": "sdpo_sync"}, r"needs 1 GPUs \(for sampling and training in turns\), and .* has 0"),
        ({"overrides": ["trainer.nnodes=2"]}, r"needs 3 GPUs .* start a Ray cluster first"),
        ({"without": "vllm"}, r"vLLM is not installed; pip install 'sdpo\[verl,vllm\]'"),
        ({"without": "cupy"}, r"backend=nccl: verl needs CuPy for it; pip install cupy-cuda13x"),
        (
            {"overrides": [f"{MODEL}.override_config.attn_implementation=flash_attention_2"]},
            r"flash-attn is not installed; pip install flash-attn .* or use sdpa",
        ),
    ],
)
def test_missing_requirement_is_reported(check: Callable[..., None], wrong: dict[str, Any], message: str) -> None:
    settings = dict(wrong)
    with pytest.raises(SDPOError, match=message):
        check(*settings.pop("overrides", ()), **settings)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_missing_optimizer_package_has_the_same_message_on_both_backends(
    device: str, check: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(SDPOError) as native:
        build_optimizer([torch.nn.Parameter(torch.zeros(1))], OptimConfig(name="adamw_8bit"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VERL_PLATFORM", device)
        with pytest.raises(SDPOError) as on_verl:
            check(f"{OPTIM}.optimizer_impl=torchao.optim", f"trainer.device={device}")
        with pytest.raises(SDPOError, match=r"bitsandbytes\.optim cannot be imported .*; pip install bitsandbytes$"):
            check(f"{OPTIM}.optimizer_impl=bitsandbytes.optim", f"trainer.device={device}")
    setting, _, message = str(native.value).partition(": ")
    assert setting == "optim.name=adamw_8bit"
    assert str(on_verl.value) == f"{OPTIM}.optimizer_impl=torchao.optim: {message}"
    assert message.startswith("torchao.optim cannot be imported (") and message.endswith(
        "; pip install 'sdpo[torchao]'"
    )


@pytest.mark.parametrize(
    ("name", "gcc", "header", "message"),
    [
        ("cc-9", True, True, r"Triton finds no C compiler \(cc-9\); apt install gcc$"),
        (None, False, True, r"Triton finds no C compiler \(gcc or clang\); apt install gcc$"),
        (None, True, False, r"Triton finds no Python\.h; apt install python3-dev$"),
    ],
)
def test_optimizer_that_compiles_needs_a_c_compiler_on_a_gpu(
    name: str | None,
    gcc: bool,
    header: bool,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    bin_dir, include = tmp_path / "bin", tmp_path / "include"
    for folder, file, exists in ((bin_dir, "gcc", gcc), (include, "Python.h", header)):
        folder.mkdir()
        if exists:
            (folder / file).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(bin_dir))
    monkeypatch.setattr(c_compiler.sysconfig, "get_path", lambda _: str(include))
    monkeypatch.delenv("CC", raising=False)
    if name is not None:
        monkeypatch.setenv("CC", name)
    with pytest.raises(SDPOError, match=message):
        require_compiler("optim.name=adamw_8bit")


def test_compiler_is_required_by_torchao_on_gpus_alone(
    check: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(without="a compiler")
    with pytest.raises(SDPOError, match=rf"^{OPTIM}\.optimizer_impl=torchao\.optim: a compiler$"):
        check(f"{OPTIM}.optimizer_impl=torchao.optim", without="a compiler")
    monkeypatch.setattr(optimizer, "find_missing_compiler", lambda: "a compiler")
    weight = SimpleNamespace(is_cuda=True)
    with pytest.raises(SDPOError, match=r"^optim\.name=adamw_8bit: a compiler$"):
        build_optimizer([weight], OptimConfig(name="adamw_8bit"))


def test_sync_trainer_needs_no_cupy(check: Callable[..., None]) -> None:
    check(name="sdpo_sync", num_gpus=1, without="cupy")


def test_local_gpus_are_not_counted_with_a_ray_cluster(
    check: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as cluster:
        address = f"127.0.0.1:{cluster.getsockname()[1]}"
        monkeypatch.setattr(requirements, "read_ray_address", lambda: address)
        check("trainer.nnodes=2", num_gpus=0)
    with pytest.raises(SDPOError, match=f"names a Ray cluster at {address} that does not answer; run ray stop"):
        check("trainer.nnodes=2", num_gpus=0)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with pytest.raises(SDPOError, match="needs 3 GPUs"):
        check("trainer.nnodes=2", num_gpus=0)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check("trainer.nnodes=2", num_gpus=0)


def test_cpu_run_needs_no_gpu_and_no_vllm(check: Callable[..., None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VERL_PLATFORM", "cpu")
        check("trainer.device=cpu", num_gpus=0, without="vllm")


def test_head_size_that_vllm_misreads_is_refused() -> None:
    heads = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
    with pytest.raises(SDPOError, match=r"head_dim=32 is not hidden_size / num_attention_heads = 64 / 4"):
        check_head_size(Qwen2Config(**heads), "model")
    check_head_size(Qwen2Config(**{**heads, "head_dim": 16}), "model")
    check_head_size(Qwen2Config(hidden_size=64, num_attention_heads=4), "model")
    check_head_size(Qwen3Config(**heads), "model")  # reads head_dim


def test_vllm_supports_the_head_sizes_of_the_toy_models() -> None:
    for model in (
        hidden_rule.build_model(len(hidden_rule.build_tokenizer())),
        figures.build_model(figures.build_tokenizer()),
    ):
        check_head_size(model.config, "model")
        text = model.config.get_text_config()
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        assert size % 32 == 0, "vLLM has no smaller heads on a CPU"
