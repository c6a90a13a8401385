"""The offline task with images: its figures, rows, tokenizer and tiny model, and that making them is reproducible."""

from __future__ import annotations

import io
import itertools
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.errors import SDPOError
from sdpo.prompting.demonstrations import PrivilegedContext
from sdpo.prompting.tokenization import encode_prompt, encode_teacher_prompt
from sdpo.rewards.base import RewardOutput, Row, load_task
from sdpo.rewards.toy import figures
from sdpo.rewards.toy.figures import (
    LABELLED_TOKENS,
    PRETRAINED_ORDERS,
    QUESTION,
    TARGET_ORDER,
    Figures,
    build_image_processor,
    build_tokenizer,
    draw_quadrilateral,
    shuffle_images,
)

SMALL: dict[str, Any] = {"pretrain_steps": 2, "num_train": 20, "num_test": 6}
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]


@pytest.fixture(scope="module", autouse=True)
def few_figures() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "NUM_PRETRAINING_FIGURES", 70)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "figures"
    Figures(str(folder), **SMALL).prepare()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- figures


def test_figure_has_four_digits_on_its_sides() -> None:
    picture = draw_quadrilateral((3, 8, 1, 6), random.Random(0))
    assert picture.labels == {"side 0": "3", "side 1": "8", "side 2": "1", "side 3": "6"}
    assert Image.open(io.BytesIO(picture.png)).size == (84, 84)


def test_label_is_inside_the_patch_of_its_visual_token() -> None:
    plain = dict(zip(range(9), [0.0] * 9, strict=True))
    for seed in range(20):
        first, other = (
            Image.open(io.BytesIO(draw_quadrilateral(digits, random.Random(seed)).png)).convert("L")
            for digits in ((1, 2, 3, 4), (8, 2, 3, 4))
        )
        for token in plain:
            box = (28 * (token % 3), 28 * (token // 3), 28 * (token % 3) + 28, 28 * (token // 3) + 28)
            pairs = zip(first.crop(box).tobytes(), other.crop(box).tobytes(), strict=True)
            plain[token] += sum(abs(a - b) for a, b in pairs)
    assert LABELLED_TOKENS[0] == 1
    assert plain[1] > 0.9 * sum(plain.values()), "only the label of the top side was another"


def test_target_order_shares_nothing_with_the_pretrained_orders() -> None:
    for order in PRETRAINED_ORDERS:
        assert sorted(order) == sorted(TARGET_ORDER) == [0, 1, 2, 3]
        assert all(a != b for a, b in zip(order, TARGET_ORDER, strict=True))
        assert not set(itertools.pairwise(order)) & set(itertools.pairwise(TARGET_ORDER))


# --- rows


def test_rows_are_in_verl_s_schema(made: Path) -> None:
    seen = []
    for split, num_rows in (("train", 20), ("test", 6)):
        records = pq.read_table(made / f"{split}.parquet").to_pylist()
        assert len(records) == num_rows
        for index, record in enumerate(records):
            assert list(record) == ["data_source", "prompt", "images", "ability", "reward_model", "extra_info"]
            assert record["data_source"] == "figures"
            assert record["prompt"] == [{"role": "user", "content": "<image>Read the sides."}]
            [cell] = record["images"]
            assert cell["path"] is None
            assert Image.open(io.BytesIO(cell["bytes"])).size == (84, 84)
            assert record["extra_info"] == {"split": split, "index": index}
            assert record["reward_model"]["style"] == "rule"
            seen.append(record["reward_model"]["ground_truth"])
    assert all(len(set(answer)) == 4 and answer.isdigit() for answer in seen)
    assert len(set(seen)) == 26, "no figure is in both files, or twice in one"


def test_answers_are_the_labels_anticlockwise_from_the_top(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def record(digits: Any, rng: random.Random) -> Any:
        drawn.append(draw_quadrilateral(digits, rng))
        return drawn[-1]

    monkeypatch.setattr(figures, "draw_quadrilateral", record)
    rows = [row for rows in Figures("x", **SMALL)._draw_rows().values() for row in rows]
    for picture, row in zip(drawn, rows, strict=True):
        top, right, bottom, left = (picture.labels[f"side {i}"] for i in range(4))
        assert row["reward_model"]["ground_truth"] == top + left + bottom + right
        assert row["images"] == [picture.to_cell()]


def test_shuffled_images_come_from_another_row(made: Path) -> None:
    rows = pq.read_table(made / "train.parquet").to_pylist()
    shuffled = shuffle_images(rows, seed=0)
    assert shuffled == shuffle_images(rows, seed=0) != shuffle_images(rows, seed=1)
    for before, after in zip(rows, shuffled, strict=True):
        assert before["images"] != after["images"]
        assert {**before, "images": None} == {**after, "images": None}
    assert sorted(row["images"][0]["bytes"] for row in rows) == sorted(row["images"][0]["bytes"] for row in shuffled)
    with pytest.raises(SDPOError, match="needs at least two rows, got 1"):
        shuffle_images(rows[:1], seed=0)


def test_only_exact_answers_score() -> None:
    task = load_task("figures", {"dir": "x"})
    row = Row("figures", [], {"style": "rule", "ground_truth": "3618"})
    assert task.compute_score(row, "3618") == task.compute_score(row, " 3618\n") == RewardOutput(1.0, None)
    for wrong in ("", "8163", "361", "36188", "3 618"):
        assert task.compute_score(row, wrong) == RewardOutput(0.0, "Expected: 3618")


# --- tokenizer, image processor, model


def test_chat_template_marks_images() -> None:
    tokenizer = build_tokenizer()
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    expected = f"<|im_start|>user\n{image}Read the sides.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(encode_prompt(tokenizer, MESSAGES)) == expected
    assert tokenizer.decode(encode_prompt(tokenizer, [{"role": "user", "content": "3618"}])) == (
        "<|im_start|>user\n3618<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [tokenizer.decode(t) for t in tokenizer("3618")["input_ids"]] == list("3618")


def test_prompts_of_the_shipped_config_fit() -> None:
    tokenizer = build_tokenizer()
    assert len(encode_prompt(tokenizer, MESSAGES)) + 8 <= 64, "data.max_prompt_length; an image is nine tokens"
    teacher = encode_teacher_prompt(tokenizer, MESSAGES, PrivilegedContext(solution="3618"), SelfDistillationConfig())
    assert teacher.token_ids is not None and len(teacher.token_ids) + 8 <= 64


def test_image_processor_does_not_resize_a_figure() -> None:
    before = dict(Qwen2VLImageProcessorPil.size)
    processor = build_image_processor()
    assert Qwen2VLImageProcessorPil.size == before, "the class's own defaults"
    image = Image.open(io.BytesIO(draw_quadrilateral((3, 8, 1, 6), random.Random(0)).png))
    assert processor([image], return_tensors="pt")["image_grid_thw"].tolist() == [[1, 6, 6]]


def test_transformers_loads_model_tokenizer_and_image_processor(made: Path) -> None:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(made / "model")
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    assert len(tokenizer) == model.config.text_config.vocab_size
    assert tokenizer.eos_token_id == model.config.text_config.eos_token_id == 2
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.convert_ids_to_tokens(model.config.image_token_id) == "<|image_pad|>"
    assert Qwen2VLImageProcessorPil.from_pretrained(made / "model").size == build_image_processor().size
    # As the model itself reads a prompt with its picture: the same numbers as the shortcut of pretraining.
    drawn = figures._draw_for_pretraining(random.Random(0), build_image_processor())
    bare, _ = figures._build_skeletons(model, tokenizer)
    written = torch.tensor([figures._digit_ids(tokenizer)[:4]])
    ids = torch.cat([bare.token_ids[None], written], dim=1)
    whole = model(
        input_ids=ids,
        pixel_values=drawn.patches[0],
        image_grid_thw=torch.tensor([[1, 6, 6]]),
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        attention_mask=torch.ones_like(ids),
    ).logits[:, -5:]
    torch.testing.assert_close(
        bare.compute_logits(model, drawn.encode(model, torch.tensor([0])), written, written), whole
    )


# --- making


def test_equal_arguments_give_equal_files(made: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Figures(str(tmp_path / "again"), **SMALL).prepare()
    assert torch.equal(torch.rand(3), expected), "the generator of whoever calls is left alone"
    assert contents(tmp_path / "again") == contents(made)
    assert {"train.parquet", "model/model.safetensors", "model/preprocessor_config.json"} <= contents(made).keys()


def test_another_seed_gives_other_files(made: Path, tmp_path: Path) -> None:
    Figures(str(tmp_path / "other"), seed=1, **SMALL).prepare()
    other, first = contents(tmp_path / "other"), contents(made)
    for name in ("train.parquet", "test.parquet", "model/model.safetensors"):
        assert other[name] != first[name]


def test_folder_with_other_arguments_is_refused(made: Path) -> None:
    before = contents(made)
    Figures(str(made), **SMALL).prepare()
    with pytest.raises(SDPOError, match="was created with"):
        Figures(str(made), **{**SMALL, "seed": 1}).prepare()
    assert contents(made) == before


def test_folder_with_other_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SDPOError, match="exists without figures data"):
        Figures(str(tmp_path), **SMALL).prepare()


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ({"num_test": 0}, "num_test=0: must be an integer of at least 1"),
        ({"seed": 1.5}, "seed=1.5: must be an integer of at least 0"),
        ({"pretrain_steps": -1}, "pretrain_steps=-1: must be an integer of at least 0"),
        ({"num_train": 5000}, "exceeds the 5040 possible figures"),
        ({"dir": ""}, "dir='': must be the name of a folder"),
    ],
)
def test_invalid_arguments_are_refused(args: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SDPOError, match=r"data\.task_args") as caught:
        Figures(**{"dir": "x", **args})
    assert complaint in str(caught.value)


# --- pretraining


@pytest.mark.slow
def test_pretrained_model_reads_clockwise_and_copies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(figures, "NUM_PRETRAINING_FIGURES", 1500)
    Figures(str(tmp_path / "x"), pretrain_steps=250, num_train=1, num_test=1).prepare()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "x" / "model")
    tokenizer = build_tokenizer()
    drawn = figures._draw_for_pretraining(random.Random("others"), build_image_processor())
    which = torch.arange(64)
    bare, shown = figures._build_skeletons(model, tokenizer)
    digit_ids = torch.tensor(figures._digit_ids(tokenizer))
    target = digit_ids[drawn.digits[which][:, list(TARGET_ORDER)]]
    with torch.no_grad():
        seen = drawn.encode(model, which)
        clockwise = digit_ids[drawn.digits[which]]
        copied = shown.compute_logits(model, seen, target, clockwise)[:, :-1].argmax(-1)
        chances = bare.compute_logits(model, seen, target, target)[:, :-1].softmax(-1).gather(2, target[..., None])
        first = bare.compute_logits(model, seen, target, target)[:, 0].softmax(-1)
    assert (copied == target).float().mean() > 0.95, "what it is shown, though it wrote something else"
    assert chances.prod(dim=1).mean() < 0.02, "unprompted, rarely what the task wants"
    read = sum(first.gather(1, digit_ids[drawn.digits[which][:, [side]]]) for side in (1, 3))
    assert read.mean() > 0.6, "the label at the right or at the left comes first"
