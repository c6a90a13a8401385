"""Rows with images on verl: the native trainer's tokens; unreadable rows are reported or skipped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from verl.tools.function_tool import FUNCTION_TOOL_REGISTRY
from verl.utils import hf_processor
from verl.utils.dataset.rl_dataset import get_dataset_class
from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder
from vision_language import make_image

from sdpo.config.data import DataConfig
from sdpo.config.model import ModelConfig
from sdpo.errors import SDPOError
from sdpo.models.loading import load_tokenizer
from sdpo.models.multimodal.processor import MultimodalProcessor, load_reader
from sdpo.prompting.tokenization import encode_prompt
from sdpo.verl_backend.cpu import processor as cpu_processor
from sdpo.verl_backend.entrypoint.compose import compose_config

IN_PROCESS = ["data.filter_overlong_prompts_workers=null"]
FAMILIES = ("qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module", autouse=True)
def _without_torchvision() -> Any:
    """Apply the plugin's patch for ``VERL_PLATFORM=cpu``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_processor.AutoProcessor, "from_pretrained", cpu_processor.AutoProcessor.from_pretrained)
        cpu_processor.fall_back_without_torchvision()
        yield


def make_row(content: Any, images: list[Any]) -> dict[str, Any]:
    return {
        "data_source": "x",
        "prompt": [{"role": "system", "content": "Short."}, {"role": "user", "content": content}],
        "reward_model": {"style": "rule", "ground_truth": "1"},
        "images": images,
    }


def as_file(data: bytes) -> dict[str, Any]:
    return {"bytes": data, "path": None}


@pytest.fixture
def load(vision_dir: Callable[[str], Path], tmp_path: Path) -> Callable[..., Any]:
    def load(family: str, rows: list[dict[str, Any]], *overrides: str, decoded: bool = False, **settings: Any) -> Any:
        table = datasets.Dataset.from_list(rows)
        if decoded:
            table = table.cast_column("images", datasets.Sequence(datasets.Image()))
        file = tmp_path / "rows.parquet"
        table.to_parquet(str(file))
        config = compose_config(
            "sdpo_trainer", [f"data.train_files={file}", f"data.val_files={file}", *IN_PROCESS, *overrides]
        ).data
        kind = get_dataset_class(config)
        processor = hf_processor(str(vision_dir(family))) if family != "text" else None
        tokenizer = load_tokenizer(ModelConfig(path=str(vision_dir("qwen2_5_vl" if processor is None else family))))
        return kind([str(file)], tokenizer, config, processor, **settings)

    return load


def encode_on_verl(rows: Any, number: int) -> list[int]:
    """Encode a row as the agent loop does before sampling."""
    messages = list(rows[number]["raw_prompt"])
    images, videos, _ = asyncio.run(type(rows).process_multi_modal_info(messages, 14, rows.config))
    assert videos is None
    builder = create_continuous_token_builder(
        rows.tokenizer, hf_model_type=rows.processor.config.model_type, processor=rows.processor
    )
    return list(builder.build_initial_tokens(messages, images=images))


@pytest.mark.parametrize("decoded", [False, True], ids=["encoded", "decoded by datasets"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_tokens_match_the_native_trainer(
    family: str, decoded: bool, load: Callable[..., Any], vision_dir: Callable[[str], Path]
) -> None:
    images = [as_file(make_image(i, (56 + 28 * i, 56))) for i in range(3)]
    rows = [
        make_row("<image>how long?", images[:1]),
        make_row("how long?", []),
        make_row("<image>or <image>\nor<image>?", images),
    ]
    loaded = load(family, rows, "data.max_pixels=10000", decoded=decoded)
    reader = load_reader(ModelConfig(path=str(vision_dir(family))), 10_000)
    assert reader is not None and len(loaded) == 3
    for number in range(3):
        messages = loaded[number]["raw_prompt"]
        ours = reader.apply_chat_template(messages, add_generation_prompt=True)
        assert encode_on_verl(loaded, number) == ours
        assert ours.count(reader.tokenizer.convert_tokens_to_ids("<|image_pad|>")) == [4, 0, 4 + 6 + 8][number]


def test_max_pixels_limits_images_from_a_path(load: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "large.png"
    file.write_bytes(make_image(0, (112, 112)))
    rows = [make_row("<image>", [{"bytes": None, "path": str(file)}])]
    assert encode_on_verl(load("qwen2_5_vl", rows), 0).count(5) == 16
    assert encode_on_verl(load("qwen2_5_vl", rows, f"data.max_pixels={56 * 56}"), 0).count(5) == 4
    assert compose_config("sdpo_trainer", [f"data.train_files={file}", f"data.val_files={file}"]).data.max_pixels == (
        DataConfig.max_pixels
    )


BROKEN = {
    "not an image": (make_row("<image>how long?", [as_file(b"text")]), "not an image file that can be read"),
    "more images than tags": (
        make_row("<image>?", [as_file(make_image(i)) for i in range(2)]),
        "1 <image> and the row",
    ),
    "more tags than images": (make_row("<image><image>", [as_file(make_image(0))]), "2 <image> and the row has 1"),
}


def test_row_that_cannot_be_encoded_is_an_error(load: Callable[..., Any]) -> None:
    """verl drops it as overlong."""
    rows = [make_row("one", []), {**make_row("two", []), "prompt": [{"role": "user", "content": "x"}]}]
    template = '{% if messages[0].role != "system" %}{{ raise_exception("no system message") }}{% endif %}'
    with pytest.raises(SDPOError, match=r"row 1: the model's chat template rejects the prompt \(.*no sys"):
        load("text", rows, f"+data.apply_chat_template_kwargs.chat_template='{template}'")


def test_spelled_control_tokens_are_text_and_nulls_are_left_out(load: Callable[..., Any]) -> None:
    """A parquet column has the keys of all rows: the text part has a null image, and the image part a null text."""
    parts = [{"type": "image"}, {"type": "text", "text": "<|image_pad|> <|im_end|>?"}]
    spelled = {**make_row("", [as_file(make_image(0))]), "prompt": [{"role": "user", "content": parts}]}
    data = load("qwen2_5_vl", [spelled])
    (message,) = data[0]["raw_prompt"]
    assert [sorted(part) for part in message["content"]] == [["image", "type"], ["text", "type"]]
    token_ids = encode_prompt(data._reader, data[0]["raw_prompt"])
    plain = encode_prompt(
        data._reader, [{"role": "user", "content": [message["content"][0], {"type": "text", "text": "x"}]}]
    )
    control = data.tokenizer.added_tokens_decoder
    assert [i for i in token_ids if i in control] == [i for i in plain if i in control]


@pytest.mark.parametrize("name", BROKEN)
def test_unreadable_row_is_reported_or_skipped(name: str, load: Callable[..., Any], capsys: Any) -> None:
    broken, message = BROKEN[name]
    rows = [make_row("<image>how long?", [as_file(make_image(1))]), broken]
    with pytest.raises(SDPOError) as caught:
        load("qwen2_5_vl", rows)
    assert "rows.parquet: row 1: " in str(caught.value) and message in str(caught.value)
    assert str(caught.value).endswith("; set data.filter_unreadable_images=true to skip such rows")
    assert len(load("qwen2_5_vl", rows, "data.filter_unreadable_images=true")) == 1
    assert "skipped 1 of 2 rows" in capsys.readouterr().out
    with pytest.raises(SDPOError, match="no row is left"):
        load("qwen2_5_vl", [broken], "data.filter_unreadable_images=true")


def test_images_for_a_language_model_are_refused(load: Callable[..., Any]) -> None:
    with pytest.raises(SDPOError, match=r"rows.parquet: has images, but .* reads none"):
        load("text", [make_row("how long?", []), make_row("<image>", [as_file(make_image(0))])])
    rows = load("text", [make_row("how <image> long?", [])])
    assert rows[0]["raw_prompt"][1]["content"] == "how <image> long?"


def test_prompt_length_includes_image_tokens(load: Callable[..., Any]) -> None:
    rows = [make_row("<image>?", [as_file(make_image(0))]), make_row("<image>?", [as_file(make_image(0, (112, 112)))])]
    lengths = [len(encode_on_verl(load("qwen2_5_vl", rows), number)) for number in range(2)]
    assert lengths[1] == lengths[0] + 12
    assert len(load("qwen2_5_vl", rows, f"data.max_prompt_length={lengths[0]}")) == 1
    assert np.array_equal(load("qwen2_5_vl", rows)[0]["raw_prompt"][1]["content"][0]["image"], make_image(0))
    assert isinstance(load("qwen2_5_vl", rows)._reader, MultimodalProcessor)


@pytest.mark.parametrize("seed", [0, 1])
def test_max_samples_keeps_the_first_rows_that_fit(seed: int, load: Callable[..., Any]) -> None:
    """As on the native trainer, for every seed. verl draws rows at random and then drops overlong rows."""
    rows = [make_row(f"{i}?" + (" and so on" * 99 if i in (1, 3) else ""), []) for i in range(12)]
    for row in rows:
        del row["images"]
    settings = ["data.shuffle=true", f"data.seed={seed}", "data.max_prompt_length=60"]
    taken = [row["raw_prompt"][1]["content"] for row in load("text", rows, *settings, max_samples=4)]
    assert taken == ["0?", "2?", "4?", "5?"]
    assert len(load("text", rows, *settings)) == 10
    assert len(load("text", rows, *settings, max_samples=99)) == 10


TOOLS = """
from verl.tools.function_tool import function_tool

@function_tool
def add(a: int) -> str:
    \"\"\"Add one.

    Args:
        a: to it
    \"\"\"
    return str(a + 1)
"""


@pytest.fixture
def with_tools(tmp_path: Path) -> list[str]:
    (tmp_path / "tools.py").write_text(TOOLS)
    FUNCTION_TOOL_REGISTRY.clear()
    turns = "actor_rollout_ref.rollout.multi_turn"
    return [f"{turns}.enable=true", f"{turns}.function_tool_path={tmp_path / 'tools.py'}"]


def make_text_row(**columns: Any) -> dict[str, Any]:
    return {
        "data_source": "x",
        "prompt": [{"role": "user", "content": "hi"}],
        "reward_model": {"style": "rule"},
        **columns,
    }


def test_supported_agent_loops_are_accepted(load: Callable[..., Any], with_tools: list[str]) -> None:
    for names in (["single_turn_agent"], ["sdpo_single_turn", "single_turn_agent"]):
        assert len(load("text", [make_text_row(agent_name=name) for name in names])) == len(names)
    rows = load("text", [make_text_row(agent_name="tool_agent", extra_info={"tool_selection": None})], *with_tools)
    assert rows[0]["agent_name"] == "tool_agent"
    assert [schema["function"]["name"] for schema in rows.tool_schemas] == ["add"]


@pytest.mark.parametrize(
    ("columns", "tools", "message"),
    [
        (
            {"agent_name": "tool_agent"},
            False,
            "'tool_agent', but actor_rollout_ref.rollout.multi_turn.enable=false",
        ),
        ({"agent_name": "single_turn_agent"}, True, "enable=true needs sdpo_tools or tool_agent; change or drop"),
        ({"agent_name": "swe_agent"}, True, "column agent_name has 'swe_agent'"),
        ({"extra_info": {"tool_selection": ["add"]}}, True, "row 1: extra_info.tool_selection is not supported"),
    ],
)
def test_rows_with_unsupported_agent_settings_are_refused(
    columns: dict[str, Any], tools: bool, message: str, load: Callable[..., Any], with_tools: list[str]
) -> None:
    first = {"agent_name": "tool_agent"} if "agent_name" in columns and tools else {}
    rows = [make_text_row(**{name: None for name in columns} | first), make_text_row(**columns)]
    if not first and "agent_name" in columns:
        rows = rows[1:]
    with pytest.raises(SDPOError) as caught:
        load("text", rows, *(with_tools if tools else []))
    assert message in str(caught.value) and "\n" not in str(caught.value)
