"""The native trainer with images: micro-batches, runs of the vision tower, complete runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn
from vision_language import FAMILIES, STOP, LoadedModel, make_image, make_messages, plain_logits

from sdpo.config.root import SDPOConfig
from sdpo.errors import SDPOError
from sdpo.models.forward import PaddedSequences, compute_hidden
from sdpo.models.generation.sampling import Completion
from sdpo.models.lora.adapters import add_adapters
from sdpo.models.multimodal import feature_cache, vision_tower
from sdpo.models.multimodal.feature_cache import ImageFeatureCache
from sdpo.models.multimodal.processor import load_processor
from sdpo.models.multimodal.vision_tower import freeze_vision_tower, get_vision_tower_parameters
from sdpo.models.output_head import build_linear_head, compute_dense_logits
from sdpo.models.packing.layout import PackedSequences
from sdpo.models.packing.support import enable_packing
from sdpo.observability import metrics
from sdpo.prompting.demonstrations import PrivilegedContext, ScoredRollout
from sdpo.prompting.images import collect_images
from sdpo.prompting.teacher_context import TeacherContext
from sdpo.prompting.tokenization import encode_teacher_prompt
from sdpo.rewards.base import Row
from sdpo.rewards.toy.synthetic_geometry import write_drawn_geometry
from sdpo.trainer.actor.actor import Actor
from sdpo.trainer.actor.build import build_actor
from sdpo.trainer.actor.collate import Collator
from sdpo.trainer.actor.forward import PolicyForward
from sdpo.trainer.data.prompts import Prompt
from sdpo.trainer.data.samples import TrainingSample
from sdpo.trainer.rollout.vllm_engine import VllmEngine
from sdpo.trainer.trainer import SDPOTrainer

VisionModel = Callable[[str], LoadedModel]
MakeRun = Callable[..., SDPOConfig]
CPU = torch.device("cpu")


def make_samples(
    loaded: LoadedModel, run: SDPOConfig, counts: Sequence[int] = (0, 1, 3), n: int = 2
) -> list[TrainingSample]:
    """``n`` rollouts per prompt with this many images; every second teacher sees a demonstration."""
    samples = []
    for number in counts:
        messages = make_messages(number)
        prompt = Prompt(Row("tiny", messages, {"ground_truth": "12"}), list(loaded.encode(messages).token_ids), "12")
        for i in range(n):
            response = [10 + 7 * number + i, 40 + i, 90 + number, STOP][i % 2 :]
            shown = PrivilegedContext(solution="12" if i % 2 == 0 and run.self_distillation.distills else None)
            teacher = encode_teacher_prompt(loaded.reader, messages, shown, run.self_distillation)
            assert collect_images(teacher.messages) == prompt.images
            samples.append(
                TrainingSample(
                    prompt=prompt,
                    response=Completion(response, [-2.0] * len(response), finished=True),
                    rollout=ScoredRollout(i, "", float(i)),
                    context=TeacherContext(shown, teacher),
                    advantage=0.5 - i,
                    distillation_weight=1.0,
                )
            )
    return samples


def step_images(loaded: LoadedModel, frozen: bool = False) -> ImageFeatureCache:
    return ImageFeatureCache(loaded.vision.reader, student=loaded.model, frozen=frozen, precision=torch.no_grad)


# --- 1: logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_samples", [1, 6])
@pytest.mark.parametrize("packs", [True, False])
def test_logits_of_student_and_teacher_equal_those_of_each_sample_alone(
    vision_model: VisionModel, make_run: MakeRun, family: str, num_samples: int, packs: bool
) -> None:
    loaded = vision_model(family)
    samples = make_samples(loaded, make_run())[-num_samples:]
    distilled = [s for s in samples if s.is_distilled]
    expected = [plain_logits(loaded.model, loaded.reader, s.prompt.row.prompt, s.response.token_ids) for s in samples]
    by_teacher = [
        plain_logits(loaded.model, loaded.reader, s.teacher_prompt.messages, s.response.token_ids) for s in distilled
    ]
    cost = enable_packing(loaded.model, loaded.vision) if packs else None
    assert (cost is not None) == (packs and family != "gemma3")  # its image tokens attend to each other
    shares = None if cost is None else replace(cost, flops_per_call=0.0)  # sharing is no gain for models this small
    batch = Collator(0, CPU, loaded.vision, shares).collate(samples)
    images = step_images(loaded)

    def compute(sequences: PaddedSequences | PackedSequences) -> Tensor:
        features = images.select(loaded.model, sequences.images)
        with torch.no_grad():
            hidden = compute_hidden(loaded.model, sequences, vision=loaded.vision, features=features)
            return compute_dense_logits(build_linear_head(loaded.model, hidden))

    torch.testing.assert_close(compute(batch.student), torch.cat(expected), atol=1e-4, rtol=1e-4)
    if batch.teacher is not None:
        torch.testing.assert_close(compute(batch.teacher), torch.cat(by_teacher), atol=1e-4, rtol=1e-4)
    if cost is not None and num_samples == 6:
        assert len(batch.student.images) == 1 + 3, "the row contains a prompt's images once"


# --- 2: runs of the vision tower


class Counter:
    """Count the images that each module's tower reads, with and without gradients."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passed: list[tuple[nn.Module, int, bool]] = []
        run = feature_cache.run_vision_tower

        def count(model: nn.Module, pixels: Sequence[Any]) -> Any:
            self.passed.append((model, len(pixels), torch.is_grad_enabled()))
            return run(model, pixels)

        monkeypatch.setattr(feature_cache, "run_vision_tower", count)

    def of(self, module: nn.Module | None, grad: bool) -> int:
        return sum(number for model, number, had in self.passed if model is module and had == grad)


@pytest.mark.parametrize(
    ("settings", "student", "again", "teacher"),
    [
        ({}, 3, 3, 3),
        ({"actor__freeze_vision_tower": True}, 3, 0, 0),
        ({"lora__rank": 2}, 3, 0, 0),
        ({"self_distillation__teacher_regularization": "live"}, 3, 3, 0),
        ({"self_distillation__teacher_regularization": "trust-region"}, 3, 3, 3),
        ({"self_distillation__policy_loss_weight": 1.0}, 3, 3, 0),
        # Two optimizer steps: the first has one image, the second all, with recomputed features.
        ({"actor__mini_batch_size": 2}, 6, 4, 3),
        ({"actor__mini_batch_size": 2, "actor__freeze_vision_tower": True}, 3, 0, 0),
    ],
)
def test_vision_tower_reads_each_image_of_a_step_once(
    vision_model: VisionModel,
    make_run: MakeRun,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    student: int,
    again: int,
    teacher: int,
) -> None:
    """Three distinct images in 16 rollouts of four prompts; a run per sequence would read 16 images, twice."""
    run = make_run(data__train_batch_size=4, rollout__n=4, actor__max_tokens_per_micro_batch=300, **settings)
    actor, loaded = build_learner(vision_model("qwen2_5_vl"), run)
    counter = Counter(monkeypatch)
    actor.update_policy(make_samples(loaded, run, counts=(1, 0, 3, 0), n=4))
    module = actor.teacher.module if actor.teacher is not None else None
    assert (counter.of(actor.student, False), counter.of(actor.student, True)) == (student, again)
    assert counter.of(module, False) == teacher


def build_learner(loaded: LoadedModel, run: SDPOConfig) -> tuple[Actor, LoadedModel]:
    if run.actor.freeze_vision_tower:
        freeze_vision_tower(loaded.model)
    if run.lora.rank:
        torch.manual_seed(0)
        add_adapters(loaded.model, run.lora)
    return build_actor(loaded.model, run, 0, loaded.vision), loaded


class NaiveImages:
    """A tower run with its graph for every sequence with an image, as a reference."""

    def __init__(self, vision: Any) -> None:
        self.vision = vision

    def select(self, module: nn.Module, images: Sequence[bytes]) -> list[Any]:
        return [vision_tower.run_vision_tower(module, [self.vision.reader.read_pixels(image)])[0] for image in images]

    def backward(self) -> None: ...

    clear_gradients = clear_student = backward


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        {"self_distillation__alpha": 0.5},
        {"actor__mini_batch_size": 1, "self_distillation__policy_loss_weight": 0.3},
        {"actor__freeze_vision_tower": True, "self_distillation__teacher_regularization": "trust-region"},
        {"lora__rank": 2},
    ],
)
def test_step_equals_a_step_with_a_tower_run_per_sequence(
    vision_model: VisionModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, family: str, settings: dict[str, Any]
) -> None:
    run = make_run(data__train_batch_size=3, rollout__n=2, actor__max_tokens_per_micro_batch=250, **settings)
    outcomes = []
    for naive in (False, True):
        actor, loaded = build_learner(vision_model(family), run)
        before = {n: p.detach().clone() for n, p in actor.student.named_parameters()}
        if naive:
            monkeypatch.setattr(PolicyForward, "step_images", lambda forward: NaiveImages(forward.vision))
        values = [actor.update_policy(make_samples(loaded, run)) for _ in range(2)]
        outcomes.append((values, dict(actor.student.named_parameters()), before))
    (ours, weights, before), (naive_values, naive_weights, _) = outcomes
    for mine, theirs in zip(ours, naive_values, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-6)
    for name, weight in weights.items():
        if name.endswith(
            "k_proj.bias"
        ):  # adds a constant to all scores of a query; its gradient is rounding error, which AdamW amplifies
            continue
        torch.testing.assert_close(weight, naive_weights[name], atol=5e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    tower = {id(p) for p in get_vision_tower_parameters(actor.student)}
    moved = {
        id(p) in tower
        for n, p in actor.student.named_parameters()
        if not torch.equal(p.detach(), before[n].to(p.dtype))
    }
    assert moved == ({False, True} if run.trains_vision else {False})


def test_nonfinite_sample_leaves_no_gradient_in_the_tower(vision_model: VisionModel, make_run: MakeRun) -> None:
    """The mini-batch is repeated without the sample; gradients that images had collected are discarded."""
    run = make_run(data__train_batch_size=3, rollout__n=2, actor__max_tokens_per_micro_batch=1)
    weights = []
    for broken in (True, False):
        actor, loaded = build_learner(vision_model("qwen2_5_vl"), run)
        samples = make_samples(loaded, run)
        if broken:
            samples[-2].response.log_probs[0] = float("nan")
        else:
            del samples[-2]
        values = actor.update_policy(samples)
        assert values[metrics.NONFINITE_SAMPLES] == float(broken)
        weights.append(dict(actor.student.named_parameters()))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# --- 3: complete runs


def write_rows(path: Path, counts: Sequence[int], **changes: Any) -> str:
    rows = []
    for index, number in enumerate(counts):
        images = [{"bytes": make_image(10 * index + k), "path": None} for k in range(number)]
        rows.append(
            {
                "data_source": "tiny",
                "prompt": [{"role": "user", "content": "<image>" * number + "how long?"}],
                "images": images,
                "reward_model": {"style": "rule", "ground_truth": "12"},
                **changes,
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture
def make_image_run(make_run: MakeRun, vision_dir: Callable[[str], Path], tmp_path: Path) -> MakeRun:
    def make(family: str = "qwen2_5_vl", counts: Sequence[int] = (1, 0, 2, 1), **settings: Any) -> SDPOConfig:
        task = tmp_path / "task.py"
        task.write_text("def compute_score(row, response):\n    return float('1' in response)\n")
        plain: dict[str, Any] = {
            "max_steps": 2,
            "eval_steps": 0,
            "model__path": str(vision_dir(family)),
            "data__task": str(task),
            "data__train_files": [write_rows(tmp_path / "train.parquet", counts)],
            "data__val_files": [write_rows(tmp_path / "test.parquet", (1, 0))],
            "data__train_batch_size": 2,
            "rollout__n": 2,
            "rollout__max_response_length": 4,
        }
        return make_run(**{**plain, **settings})

    return make


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_staleness", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_run_with_images(make_image_run: MakeRun, family: str, max_staleness: int) -> None:
    result = SDPOTrainer(make_image_run(family, max_staleness=max_staleness)).train()
    rows = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(row[metrics.DISTILLATION_LOSS] > 0 for row in rows[1:])
    assert all(row[metrics.ROLLOUT_KL] == pytest.approx(0, abs=0.05) for row in rows[1:2])
    assert metrics.val_name("tiny", "mean@1") in rows[0]
    checkpoint = result.output_dir / "checkpoints" / "step_2"
    assert load_processor(str(checkpoint)).image_token in ("<|image_pad|>", "<image_soft_token>")
    text = (result.output_dir / "rollouts" / "step_1.txt").read_text()
    assert "<image>" in text
    assert "\\x89PNG" not in text


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize(("setting", "tolerance"), [("gradient_checkpointing", 1e-5), ("autocast", 0.15)])
def test_checkpointing_and_autocast_reach_the_tower(
    vision_model: VisionModel, make_run: MakeRun, family: str, setting: str, tolerance: float
) -> None:
    values = []
    for on in (False, True):
        run = make_run(data__train_batch_size=3, rollout__n=2, **{f"actor__{setting}": on})
        actor, loaded = build_learner(vision_model(family), run)
        found: list[torch.Tensor] = []

        def keep(actor: Any = actor, found: list[torch.Tensor] = found) -> None:
            found += [
                p.grad.flatten().clone() for p in get_vision_tower_parameters(actor.student) if p.grad is not None
            ]

        loss = actor.update_policy(make_samples(loaded, run), before_update=keep)[metrics.LOSS]
        values.append((loss, torch.cat(found)))
    (loss, gradient), (other_loss, other_gradient) = values
    assert other_loss == pytest.approx(loss, rel=tolerance)
    assert (gradient - other_gradient).norm() <= tolerance * gradient.norm()
    assert gradient.norm() > 0
    assert setting != "autocast" or not torch.allclose(gradient, other_gradient, rtol=1e-4, atol=0), "not in bfloat16"


def test_frozen_tower_keeps_its_weights(make_image_run: MakeRun, vision_model: VisionModel) -> None:
    result = SDPOTrainer(make_image_run(actor__freeze_vision_tower=True)).train()
    from safetensors.torch import load_file

    saved = load_file(result.output_dir / "checkpoints" / "step_2" / "model.safetensors")
    before = vision_model("qwen2_5_vl").model.state_dict()
    same = {("visual" in name): set() for name in saved}
    for name, value in saved.items():
        ours = name if name in before else name.replace("visual.", "model.visual.").replace("model.model", "model")
        if ours in before:
            same["visual" in name].add(torch.equal(value, before[ours]))
    assert same[True] == {True}
    assert False in same[False]


def test_freeze_vision_tower_is_refused_for_a_language_model(make_task_run: MakeRun) -> None:
    with pytest.raises(
        SDPOError, match=r"actor\.freeze_vision_tower=true, but the model has no vision tower; remove it"
    ):
        SDPOTrainer(make_task_run(actor__freeze_vision_tower=True)).train()


def test_images_are_refused_for_a_language_model(make_task_run: MakeRun, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "images.parquet", (0, 1))
    with pytest.raises(
        SDPOError, match=r"images\.parquet: row 1: has images, but the model of model\.path has no vision tower"
    ):
        SDPOTrainer(make_task_run(data__train_files=[file])).train()


def test_vllm_with_images_is_refused(make_image_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VllmEngine, "require", staticmethod(lambda device: None))
    with pytest.raises(SDPOError, match=r"rollout\.engine=vllm does not sample from models that read images yet"):
        SDPOTrainer(make_image_run(rollout__engine="vllm")).train()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images": [{"bytes": b"no image", "path": None}]}, "not an image file"),
        ({"images": []}, None),  # the tag is then text, as on verl
        (
            {"images": [{"bytes": make_image(0), "path": None}] * 2},
            r"the prompt has 1 <image> and the row has 2 images",
        ),
        ({"images": [{"bytes": make_image(0)[:60], "path": None}]}, "not "),
        ({"images": [{"bytes": None, "path": "nowhere.png"}]}, r"image nowhere\.png: cannot be read"),
    ],
)
def test_unreadable_rows_are_refused_or_skipped(
    make_image_run: MakeRun,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: dict[str, Any],
    reason: str | None,
) -> None:
    good = pq.read_table(write_rows(tmp_path / "good.parquet", (1, 1, 1))).to_pylist()
    bad = pq.read_table(write_rows(tmp_path / "bad.parquet", (1,), **change)).to_pylist()
    file = tmp_path / "mixed.parquet"
    pq.write_table(pa.Table.from_pylist([*good[:2], *bad, *good[2:]]), file)
    run = make_image_run(data__train_files=[str(file)], max_steps=1)
    if reason is None:
        SDPOTrainer(run).train()
        return
    with pytest.raises(SDPOError, match=rf"mixed\.parquet: row 2: .*{reason}"):
        SDPOTrainer(run).train()
    assert not (tmp_path / "run").exists(), "a run folder was written"

    skipping = make_image_run(data__train_files=[str(file)], max_steps=1, data__filter_unreadable_images=True)
    if "nowhere" in reason:  # a missing path is an error of the file, not of a row
        return
    SDPOTrainer(skipping).train()
    assert any("data.train_files: skipped 1 of 4 rows; the first:" in text for text in caplog.messages)


def test_drawn_geometry_with_the_reward_function_of_geometry3k(make_image_run: MakeRun, tmp_path: Path) -> None:
    """A small Geometry3k: rows of its schema, with texts and several images, and its reward function."""
    write_drawn_geometry(tmp_path / "drawn", num_train=24, num_test=6)
    run = make_image_run(
        max_steps=1,
        data__task="geo3k",
        data__train_files=[str(tmp_path / "drawn" / "train.parquet")],
        data__val_files=[str(tmp_path / "drawn" / "test.parquet")],
        data__train_batch_size=12,  # one of each kind of problem
        data__shuffle=False,
        self_distillation__include_environment_feedback=True,
    )
    result = SDPOTrainer(run).train()
    assert result.metrics[metrics.SOLUTION_FRACTION] == 1.0
    assert result.metrics[metrics.val_name("hiyouga/geometry3k", "mean@1")] == 0.0
    text = (result.output_dir / "rollouts" / "step_1.txt").read_text()
    assert "has no final answer in \\boxed{...}" in text
    assert "Correct solution:" in text
