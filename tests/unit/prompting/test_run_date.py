"""Chat templates write the date at which the run began."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sdpo.config.root import SDPOConfig
from sdpo.prompting import run_date
from sdpo.prompting.run_date import RUN_DATE, begin_run, template_settings
from sdpo.prompting.tokenization import encode_prompt
from sdpo.trainer.trainer import SDPOTrainer

# As in Llama 3.2's template.
LLAMA = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}{{ date_string }}: "
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
)
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets the present date."""
    monkeypatch.setenv(RUN_DATE, "2001-01-01")

    def set_now(date: str) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return datetime.fromisoformat(date)

        monkeypatch.setattr(run_date, "datetime", Clock)

    return set_now


def test_prompts_have_the_date_of_the_runs_beginning(clock: Callable[[str], None], hidden_rule_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(hidden_rule_dir / "model")
    rendered: list[str] = []

    class Recorder:
        chat_template = LLAMA

        def apply_chat_template(self, conversation: Any, **settings: Any) -> list[int]:
            settings.pop("return_dict")
            settings["tokenize"] = False
            rendered.append(tokenizer.apply_chat_template(conversation, chat_template=LLAMA, **settings))
            return [1]

    clock("2026-11-28T23:59:58")
    began = begin_run()
    encode_prompt(Recorder(), MESSAGES)  # type: ignore[arg-type]
    clock("2026-11-29T00:00:03")
    encode_prompt(Recorder(), MESSAGES)  # type: ignore[arg-type]
    clock("2027-03-01")
    begin_run(began)
    encode_prompt(Recorder(), MESSAGES)  # type: ignore[arg-type]
    assert rendered == ["28 Nov 2026: hello"] * 3
    begin_run("no date")
    encode_prompt(Recorder(), MESSAGES)  # type: ignore[arg-type]
    assert rendered[-1] == "01 Mar 2027: hello"


def test_templates_without_a_date_get_no_argument() -> None:
    assert template_settings("{{ messages }}") == {} == template_settings(None)


def test_run_that_is_resumed_on_another_day_has_the_same_prompts(
    clock: Callable[[str], None], make_task_run: Callable[..., SDPOConfig], hidden_rule_dir: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(hidden_rule_dir / "model", tmp_path / "model")
    template = (model / "chat_template.jinja").read_text()
    digits = "{% if strftime_now is defined %}{{ strftime_now('%d') }}{% endif %}"
    (model / "chat_template.jinja").write_text(re.sub(r"\A", digits, template))
    clock("2026-11-28")
    run = make_task_run(model__path=str(model), max_steps=2, save_steps=1)
    SDPOTrainer(run).train()
    clock("2026-11-30")
    shutil.rmtree(Path(run.output_dir) / "checkpoints" / "step_2")
    SDPOTrainer(replace(run, resume_mode="required")).train()
    assert (Path(run.output_dir) / "checkpoints" / "step_2").is_dir()
