"""A toy task with images: read the labels of a figure in an order that the prompt does not state.

The tiny vision-language model is pretrained to read the four labelled sides of a drawn quadrilateral clockwise,
starting at the right or at the left side, and to copy a solution from its context. The task is to read the sides
anticlockwise from the top, an order that is not pretrained: almost no rollout succeeds, so the score alone gives no
signal, but the teacher is shown the ground truth. Without the right image there is no right answer.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.errors import DataError
from sdpo.observability.progress import ProgressCallback
from sdpo.prompting.demonstrations import PrivilegedContext
from sdpo.prompting.tokenization import encode_prompt, encode_teacher_prompt
from sdpo.rewards.toy import base
from sdpo.rewards.toy.base import format_digits
from sdpo.rewards.toy.drawing import Picture, draw_polygon, write_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

DATA_SOURCE = "figures"
QUESTION = "Read the sides."
NUM_DIGITS = 10
NUM_SIDES = 4  # in the order top, right, bottom, left
NUM_FIGURES = 10 * 9 * 8 * 7  # the digits of a figure differ
TARGET_ORDER = (0, 3, 2, 1)
# No position and no pair of consecutive sides agrees with the target order, so that a mixture of these orders does not
# produce the target.
PRETRAINED_ORDERS = ((1, 2, 3, 0), (3, 0, 1, 2))

PICTURE_SIZE = 84  # pixels; a visual token covers 28 x 28 pixels
TOKENS_PER_EDGE = 3
LABELLED_TOKENS = (1, 5, 7, 3)  # visual tokens, of 3 x 3 row by row, that cover the labels of sides 0, 1, 2, 3
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

VISION_STEPS = 250
LANGUAGE_STEPS = 450
NUM_PRETRAINING_FIGURES = 3000


@dataclass(frozen=True)
class Figures(base.OfflineTask):
    """The task; creates its own files.

    Args:
        dir: folder of ``model/``, ``train.parquet`` and ``test.parquet``.
        seed: random seed of the rows and the pretraining.
        pretrain_steps: steps of each of the two parts of the pretraining; None for the default numbers.
        num_train, num_test: number of rows; no four labels are in both files.
    """

    what: ClassVar[str] = "figures data"

    dir: str
    seed: int = 0
    pretrain_steps: int | None = None
    num_train: int = 2000
    num_test: int = 300

    def __post_init__(self) -> None:
        base.check_arguments(self.dir, self.seed, self.pretrain_steps, self.num_train, self.num_test)
        if self.num_train + self.num_test > NUM_FIGURES:
            raise DataError(
                f"data.task_args: num_train + num_test exceeds the {NUM_FIGURES} possible figures; lower one of them"
            )

    def write(self, folder: Path, progress: ProgressCallback) -> None:
        for split, rows in self._draw_rows().items():
            write_rows(rows, folder / f"{split}.parquet")
        self._pretrain(progress, folder / "model")

    def _draw_rows(self) -> dict[str, list[dict[str, Any]]]:
        rng = random.Random(f"rows {self.seed}")
        seen: dict[tuple[int, ...], None] = {}
        while len(seen) < self.num_train + self.num_test:
            seen[_draw_digits(rng)] = None
        figures = list(seen)
        return {
            split: [_draw_row(digits, split, index, rng) for index, digits in enumerate(chosen)]
            for split, chosen in (("train", figures[: self.num_train]), ("test", figures[self.num_train :]))
        }

    def _pretrain(self, progress: ProgressCallback, folder: Path) -> None:
        from transformers.utils import logging

        logging.disable_progress_bar()  # the bar of save_pretrained would disturb the console's
        tokenizer, image_processor = build_tokenizer(), build_image_processor()
        default = (VISION_STEPS, LANGUAGE_STEPS)
        vision_steps, language_steps = default if self.pretrain_steps is None else (self.pretrain_steps,) * 2
        with base.reproducible(self.seed):
            model = build_model(tokenizer)
            figures = _draw_for_pretraining(random.Random(f"pretraining {self.seed}"), image_processor)
            _pretrain_vision(model, tokenizer, figures, vision_steps, progress)
            _pretrain_language(model, tokenizer, figures, language_steps, progress)
        for part in (model, tokenizer, image_processor):
            part.save_pretrained(folder)


build_task = Figures


def draw_quadrilateral(digits: Sequence[int], rng: random.Random) -> Picture:
    """Draw an irregular quadrilateral with a digit at each side, clockwise from the top."""
    low, high = 26, PICTURE_SIZE - 26
    corners = [
        (x + rng.uniform(-3, 3), y + rng.uniform(-3, 3))
        for x, y in ((low, low), (high, low), (high, high), (low, high))
    ]
    return draw_polygon(corners, sides=format_digits(digits), size=(PICTURE_SIZE, PICTURE_SIZE), font_size=18)


def shuffle_images(rows: Sequence[Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Give each row the images of another row, to measure the score without the right image.

    Raises:
        DataError: there are fewer than two rows.
    """
    if len(rows) < 2:
        raise DataError(f"shuffling images needs at least two rows, got {len(rows)}")
    order = list(range(len(rows)))
    random.Random(f"shuffle {seed}").shuffle(order)
    source = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [{**row, "images": rows[source[i]]["images"]} for i, row in enumerate(rows)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a byte-level Qwen2 tokenizer with digits, the question, the default templates and image tokens."""
    return base.build_tokenizer([QUESTION, base.FEEDBACK_TEXT], CHAT_TEMPLATE, VISION_TOKENS)


def build_image_processor() -> Any:
    """Build Qwen2-VL's image processor without torchvision; it hardly resizes images of 4 to 64 visual tokens."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    # min_pixels and max_pixels would change the defaults of the class.
    return Qwen2VLImageProcessorPil(size={"shortest_edge": 4 * 28 * 28, "longest_edge": 64 * 28 * 28})


def build_model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """An untrained Qwen2.5-VL of about 370,000 parameters."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision_start, vision_end, image, video = tokenizer.convert_tokens_to_ids(list(VISION_TOKENS))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            # A small theta, so that the lowest frequencies distinguish left and right over a distance of 1 or 2.
            "rope_parameters": {"rope_type": "default", "rope_theta": 2.0, "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [0, 1],
        },
        vision_start_token_id=vision_start,
        vision_end_token_id=vision_end,
        image_token_id=image,
        video_token_id=video,
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


@dataclass(frozen=True)
class _DrawnFigures:
    """Figures as model inputs: digits [figures, 4] and patches [figures, patches, values]."""

    digits: Any
    patches: Any

    def encode(self, model: PreTrainedModel, which: Any) -> Any:
        """Compute the image features of some figures: [figures, visual tokens, hidden size]."""
        import torch

        patches = self.patches[which]
        grid = torch.tensor([[1, 2 * TOKENS_PER_EDGE, 2 * TOKENS_PER_EDGE]]).expand(len(patches), -1)
        return torch.stack(list(model.model.get_image_features(patches.flatten(0, 1), grid).pooler_output))


def _draw_for_pretraining(rng: random.Random, image_processor: Any) -> _DrawnFigures:
    import io

    import torch
    from PIL import Image

    digits = [_draw_digits(rng) for _ in range(NUM_PRETRAINING_FIGURES)]
    images = [Image.open(io.BytesIO(draw_quadrilateral(four, rng).png)) for four in digits]
    pixels = image_processor(images, return_tensors="pt")["pixel_values"]
    return _DrawnFigures(torch.tensor(digits), pixels.unflatten(0, (len(digits), -1)))


def _pretrain_vision(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    figures: _DrawnFigures,
    steps: int,
    progress: ProgressCallback,
    *,
    batch_size: int = 64,
) -> None:
    """Train the feature of each labelled visual token to equal its digit's embedding, and the others the image token's.

    Training on answers alone would take far longer, because attention and features would have to be learned together.
    """
    import torch
    from torch.nn.functional import cross_entropy

    embedding = model.get_input_embeddings().weight.detach()
    variance = embedding.square().mean()
    digit_ids = torch.tensor(_digit_ids(tokenizer))

    def compute_loss() -> Any:
        which = torch.randint(len(figures.digits), (batch_size,))
        features, digits = figures.encode(model, which), figures.digits[which]
        wanted = torch.full(features.shape[:2], model.config.image_token_id)
        wanted[:, list(LABELLED_TOKENS)] = digit_ids[digits]
        # The directions of the features are learned fast; this term also fits their length.
        distance = (features - embedding[wanted]).square().mean() / variance
        likeness = features[:, list(LABELLED_TOKENS)] @ embedding[digit_ids].T / (16 * variance)
        return cross_entropy(likeness.flatten(0, 1), digits.flatten()) + 0.1 * distance

    parameters = model.model.visual.parameters()
    base.pretrain(parameters, compute_loss, steps, progress, "pretraining the tiny model's vision tower", warmup=30)


def _pretrain_language(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    figures: _DrawnFigures,
    steps: int,
    progress: ProgressCallback,
    *,
    batch_size: int = 64,
) -> None:
    """Train two behaviours: clockwise reading after the plain prompt, and copying after a prompt with a solution.

    Copying is also trained after wrong tokens, because a teacher reads the student's mistakes. The vision tower is
    frozen, so that each figure is encoded once.
    """
    import torch
    from torch.nn.functional import cross_entropy

    bare, shown = _build_skeletons(model, tokenizer)
    orders = torch.tensor(PRETRAINED_ORDERS)
    digit_ids = torch.tensor(_digit_ids(tokenizer))
    eos = torch.full((batch_size, 1), tokenizer.eos_token_id)
    with torch.no_grad():
        features = torch.cat([figures.encode(model, which) for which in torch.arange(len(figures.digits)).split(256)])

    def compute_loss() -> Any:
        which = torch.randint(len(features), (batch_size,))
        by_order = figures.digits[which].gather(1, orders[torch.randint(len(orders), (batch_size,))])
        anything = torch.randint(NUM_DIGITS, by_order.shape)
        copied = torch.where(torch.rand(batch_size, 1) < 0.5, by_order, anything)
        mistaken = base.corrupt(copied, NUM_DIGITS)
        loss = torch.zeros(())
        for skeleton, answer, written in ((bare, by_order, by_order), (shown, copied, mistaken)):
            target = torch.cat([digit_ids[answer], eos], dim=1)
            logits = skeleton.compute_logits(model, features[which], digit_ids[answer], digit_ids[written])
            loss = loss + cross_entropy(logits.flatten(0, 1), target.flatten())
        return loss

    parameters = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    description = "pretraining the tiny model"
    base.pretrain(parameters, compute_loss, steps, progress, description, peak_lr=3e-3, warmup=40)


@dataclass(frozen=True)
class _Skeleton:
    """Tokens of a prompt from the default templates, with the positions of the image and of the answer's digits."""

    token_ids: Any  # tensor [tokens]
    is_image: Any  # bool tensor [tokens]
    is_answer: Any  # bool tensor [tokens]
    positions: Any  # tensor [3, 1, tokens + response tokens]

    def compute_logits(self, model: PreTrainedModel, features: Any, answer: Any, written: Any) -> Any:
        """Compute the logits [batch, digits + 1, V] of the response and its end token.

        Args:
            features: image features [batch, visual tokens, hidden size].
            answer: token ids [batch, digits] of the answer in the prompt, if it has one.
            written: token ids [batch, digits] of the response.
        """
        import torch

        context = self.token_ids.expand(len(features), -1).clone()
        context[:, self.is_answer] = answer[:, : int(self.is_answer.sum())]
        embeds = model.get_input_embeddings()(torch.cat([context, written], dim=1))
        places = torch.cat([self.is_image, torch.zeros(written.shape[1], dtype=torch.bool)])
        embeds = embeds.masked_scatter(places[None, :, None].expand_as(embeds), features)
        positions = self.positions.expand(-1, len(features), -1)
        return model(inputs_embeds=embeds, position_ids=positions, logits_to_keep=written.shape[1] + 1).logits


def _build_skeletons(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> tuple[_Skeleton, _Skeleton]:
    import torch

    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    shown = PrivilegedContext(solution=format_digits([1] * NUM_SIDES))
    teacher = encode_teacher_prompt(tokenizer, messages, shown, SelfDistillationConfig()).token_ids
    assert teacher is not None
    skeletons = []
    for token_ids in (encode_prompt(tokenizer, messages), teacher):
        image = model.config.image_token_id
        expanded = [token for t in token_ids for token in [t] * (TOKENS_PER_EDGE**2 if t == image else 1)]
        ids = torch.tensor(expanded)
        # The positions of response tokens do not depend on the tokens.
        complete = torch.cat([ids, torch.zeros(NUM_SIDES, dtype=torch.long)])[None]
        grid = torch.tensor([[1, 2 * TOKENS_PER_EDGE, 2 * TOKENS_PER_EDGE]])
        positions, _ = model.model.get_rope_index(complete, (complete == image).int(), image_grid_thw=grid)
        skeletons.append(_Skeleton(ids, ids == image, ids == _digit_ids(tokenizer)[1], positions))
    return skeletons[0], skeletons[1]


def _draw_digits(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.sample(range(NUM_DIGITS), NUM_SIDES))


def _draw_row(digits: Sequence[int], split: str, index: int, rng: random.Random) -> dict[str, Any]:
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": f"<image>{QUESTION}"}],
        "images": [draw_quadrilateral(digits, rng).to_cell()],
        "ability": "figures",
        "reward_model": {
            "style": "rule",
            "ground_truth": format_digits([digits[side] for side in TARGET_ORDER]),
        },
        "extra_info": {"split": split, "index": index},
    }


def _digit_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return tokenizer.convert_tokens_to_ids([str(digit) for digit in range(NUM_DIGITS)])
