"""verl's agent loops: no image tokens in responses, tools' outputs masked, tools in both prompts."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap, _agent_loop_registry
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.tools.function_tool import FUNCTION_TOOL_REGISTRY
from verl.tools.tool_registry import load_all_tools
from verl.workers.rollout.replica import TokenOutput

from sdpo.errors import SDPOError
from sdpo.prompting.tokenization import encode_prompt
from sdpo.rewards.toy.base import build_tokenizer
from sdpo.verl_backend.driver.teacher_batch import decode_turns
from sdpo.verl_backend.driver.tools import PromptTokenizer, load_tool_schemas
from sdpo.verl_backend.rollout.agent_loop import ImageFreeResponses, TextTools


def ask(monkeypatch: pytest.MonkeyPatch, processor: Any, response: list[int], mask: int = 1) -> dict[str, Any]:
    asked: dict[str, Any] = {}

    async def run(_: Any, sampling_params: dict[str, Any], **kwargs: Any) -> Any:
        asked.update(sampling_params)
        return SimpleNamespace(response_ids=response, response_mask=[mask] * len(response))

    monkeypatch.setattr(SingleTurnAgentLoop, "run", run)
    loop = object.__new__(ImageFreeResponses)
    loop.processor = processor
    asyncio.run(loop.run({"temperature": 1.0}, raw_prompt=[]))
    return asked


def test_logit_bias_excludes_image_and_video_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = SimpleNamespace(image_token_id=5, video_token_id=6)
    assert ask(monkeypatch, processor, [7, 8]) == {"temperature": 1.0, "logit_bias": {5: -100.0, 6: -100.0}}
    assert ask(monkeypatch, None, [5]) == {"temperature": 1.0}


def test_image_token_in_a_response_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="drew image token 6"):
        ask(monkeypatch, SimpleNamespace(image_token_id=5, video_token_id=6), [7, 6])
    with pytest.raises(SDPOError, match="the text of a tool's output contains image token 6"):
        ask(monkeypatch, SimpleNamespace(image_token_id=5, video_token_id=6), [7, 6], mask=0)


TOOLS = """
from verl.tools.function_tool import function_tool
from verl.tools.schemas import ToolResponse

@function_tool
def add(a: int, b: int) -> str:
    \"\"\"Add two numbers.

    Args:
        a: one
        b: the other
    \"\"\"
    return str(a + b)

@function_tool
def draw(a: int) -> str:
    \"\"\"Draw a number.

    Args:
        a: the number
    \"\"\"
    return ToolResponse(image=["pixels"])
"""
CHAT_TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool.function.name }};{% endfor %}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if brief %}!{% endif %}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "12 and 30"}]


class Turns:
    """A sampler that returns these texts in turn, each token with log-probability -1."""

    def __init__(self, tokenizer: Any, texts: list[str]) -> None:
        self.remaining = [tokenizer(text)["input_ids"] for text in texts]
        self.prompts: list[list[int]] = []

    async def generate(self, prompt_ids: list[int], **_: Any) -> TokenOutput:
        self.prompts.append(list(prompt_ids))
        token_ids = self.remaining.pop(0)
        return TokenOutput(token_ids=token_ids, log_probs=[-1.0] * len(token_ids), extra_fields={"global_steps": 3})


@pytest.fixture
def rollout(tmp_path: Path) -> DictConfig:
    (tmp_path / "tools.py").write_text(TOOLS)
    turns = {
        "enable": True,
        "format": "hermes",
        "tool_config_path": None,
        "function_tool_path": str(tmp_path / "tools.py"),
        "max_user_turns": None,
        "max_assistant_turns": None,
        "max_parallel_calls": 2,
        "max_tool_response_length": 99,
        "tool_response_truncate_side": "left",
    }
    rollout = {"prompt_length": 50, "response_length": 200, "full_determinism": False, "multi_turn": turns}
    FUNCTION_TOOL_REGISTRY.clear()
    return OmegaConf.create(rollout)


def take_turns(rollout: DictConfig, texts: list[str]) -> tuple[Any, Turns, Any]:
    tokenizer = build_tokenizer([], CHAT_TEMPLATE)
    sampler = Turns(tokenizer, texts)
    data = OmegaConf.create({"apply_chat_template_kwargs": {"brief": True}})

    async def run() -> Any:
        loop = TextTools(
            trainer_config=DictConfigWrap(OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}})),
            server_manager=sampler,
            tokenizer=tokenizer,
            processor=None,
            dataset_cls=None,
            data_config=DictConfigWrap(data),
            hf_model_type="qwen3",
            tools=ToolListWrap(load_all_tools(None, rollout.multi_turn.function_tool_path)),
        )
        return await loop.run({"temperature": 1.0}, raw_prompt=MESSAGES)

    return asyncio.run(run()), sampler, PromptTokenizer(tokenizer, load_tool_schemas(rollout), {"brief": True})


CALL = '<tool_call>{"name": "add", "arguments": {"a": 12, "b": 30}}</tool_call>'


def test_tool_output_is_in_the_response_with_mask_0(rollout: DictConfig) -> None:
    output, sampler, prompts = take_turns(rollout, [f"{CALL}<|im_end|>", "42<|im_end|>"])
    tokenizer = prompts.tokenizer
    parts = [
        (f"{CALL}<|im_end|>", 1),
        ("\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n!", 0),
        ("42<|im_end|>", 1),
    ]
    sizes = [len(tokenizer(text)["input_ids"]) for text, _ in parts]
    assert tokenizer.decode(output.response_ids) == "".join(text for text, _ in parts)
    assert output.response_mask == [mask for size, (_, mask) in zip(sizes, parts, strict=True) for _ in range(size)]
    assert output.response_logprobs == [-float(mask) for mask in output.response_mask]
    assert decode_turns(tokenizer, output.response_ids, output.response_mask) == f"{CALL}\n42"
    # The teacher's prompts have the student's tools and template settings.
    assert output.prompt_ids == encode_prompt(prompts, MESSAGES)
    assert tokenizer.decode(output.prompt_ids).startswith("add;draw;<|im_start|>user")
    assert sampler.prompts[1] == output.prompt_ids + output.response_ids[: sizes[0] + sizes[1]]


def test_images_from_tools_are_refused(rollout: DictConfig) -> None:
    call = '<tool_call>{"name": "draw", "arguments": {"a": 1}}</tool_call><|im_end|>'
    with pytest.raises(
        SDPOError, match="tool draw returned an image or a video, which loss_mode=sdpo does not support"
    ):
        take_turns(rollout, [call])


def test_agent_loops_are_registered_under_sdpo_and_verl_names() -> None:
    for ours, verls, kind in (
        ("sdpo_single_turn", "single_turn_agent", ImageFreeResponses),
        ("sdpo_tools", "tool_agent", TextTools),
    ):
        target = {"_target_": f"sdpo.verl_backend.rollout.agent_loop.{kind.__name__}"}
        assert _agent_loop_registry[ours] == _agent_loop_registry[verls] == target
