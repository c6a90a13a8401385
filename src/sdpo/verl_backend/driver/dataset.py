"""verl's dataset with the native trainer's images: the same files, pixels and errors."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import datasets
import pyarrow.compute as pc
from omegaconf import DictConfig
from verl.utils.dataset.rl_dataset import RLHFDataset

from sdpo.errors import DataError, SDPOError
from sdpo.models.multimodal.processor import MultimodalProcessor
from sdpo.prompting.images import collect_images, open_image, place_images
from sdpo.prompting.tokenization import encode_prompt
from sdpo.rewards.rows import drop_nulls, read_image
from sdpo.verl_backend.config.schema import AGENT_LOOPS, MULTI_TURN, SINGLE_TURN, TOOL_TURNS
from sdpo.verl_backend.driver.tools import PromptTokenizer
from sdpo.verl_backend.rollout import agent_loop  # noqa: F401  registers the agent loops in every process that imports the dataset

AGENT_NAME = "agent_name"


class ImageDataset(RLHFDataset):  # type: ignore[misc]
    """Rows in verl's schema, for one agent loop. Images are encoded files in content parts of the messages.

    Differences from verl's class, for which no upstream issue was found (2026-11):

    - verl opens images by qwen_vl_utils, which needs torchvision and has separate size limits. Here ``data.max_pixels``
      is the limit.
    - verl drops a row with an unreadable image as overlong. Here it is an error with the row's number, or skipped with
      ``data.filter_unreadable_images=true``.
    - verl drops a row that cannot be encoded as overlong. Here it is an error with the row's number.
    - verl draws ``max_samples`` rows at random before it drops overlong rows
      (https://github.com/verl-project/verl/pull/3812). Here they are the first usable rows, as on the native trainer.

    Raises:
        DataError: an unreadable row; rows with images for a model without a vision tower; rows with another agent loop
            or a selection of tools.
    """

    max_samples: int
    dataframe: datasets.Dataset

    def _read_files_and_tokenize(self) -> None:
        limit, self.max_samples = self.max_samples, -1
        super()._read_files_and_tokenize()
        self.max_samples = limit
        if 0 < limit < len(self.dataframe):
            self.dataframe = self.dataframe.select(range(limit))

    def maybe_filter_out_long_prompts(self, dataframe: datasets.Dataset) -> datasets.Dataset:
        """Drop prompts longer than ``data.max_prompt_length`` and, on request, rows with unreadable images."""
        self._check_turns(dataframe)
        has_images = self.image_key in dataframe.column_names
        if has_images and self.processor is None:
            if pc.max(pc.list_value_length(dataframe.data.column(self.image_key))).as_py():
                raise DataError(
                    f"{self._files}: has images, but the model at actor_rollout_ref.model.path reads none; use a "
                    "vision-language model"
                )
            has_images = False
        if has_images:
            dataframe = _undecoded(dataframe, self.image_key)
        elif not self.filter_overlong_prompts:
            return dataframe
        measured = dataframe.map(
            self._measure, num_proc=self.num_workers, remove_columns=dataframe.column_names, desc="Encoding prompts"
        )
        readable = self._find_readable(measured["unreadable"])
        if not self.filter_overlong_prompts:
            return dataframe.select(readable)
        return dataframe.select(self._find_short(readable, measured["error"], measured["length"]))

    def _measure(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the length of a row's prompt in tokens, or why its images or its prompt cannot be encoded."""
        result = {"unreadable": "", "error": "", "length": 0}
        if not self.filter_overlong_prompts and not row.get(self.image_key):
            return result
        reader = self._reader if self.processor is not None else self.tokenizer
        tokenizer = PromptTokenizer(reader, self.tool_schemas or (), self.apply_chat_template_kwargs)
        try:
            return result | {"length": len(encode_prompt(tokenizer, self._build_messages(row, self.prompt_key)))}
        except SDPOError as error:
            return result | {"unreadable" if row.get(self.image_key) else "error": str(error)}
        except Exception as error:  # a chat template is code and may raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return result | {"error": f"the model's chat template rejects the prompt ({reason})"}

    def _find_readable(self, errors: list[str]) -> list[int]:
        """Return the numbers of the rows without an error of their images."""
        broken = [number for number, error in enumerate(errors) if error]
        if broken:
            where = f"{self._files}: row {broken[0]}: {errors[broken[0]]}"
            if not self.config.filter_unreadable_images:
                raise DataError(f"{where}; set data.filter_unreadable_images=true to skip such rows")
            if len(broken) == len(errors):
                raise DataError(f"{where}; all other rows are unreadable too, so no row is left")
            print(f"skipped {len(broken)} of {len(errors)} rows with unreadable images; the first: {where}")
        return [number for number, error in enumerate(errors) if not error]

    def _find_short(self, numbers: list[int], errors: list[str], lengths: list[int]) -> list[int]:
        """Return the numbers of the rows that are short enough, out of these."""
        for number in numbers:
            if errors[number]:
                raise DataError(f"{self._files}: row {number}: {errors[number]}")
        short = [number for number in numbers if lengths[number] <= self.max_prompt_length]
        if not short:
            limit = f"data.max_prompt_length={self.max_prompt_length}"
            raise DataError(f"{self._files}: all prompts are longer than {limit}")
        if len(short) < len(numbers):
            print(f"skipped {len(numbers) - len(short)} of {len(numbers)} rows with overlong prompts")
        return short

    def _check_turns(self, rows: datasets.Dataset) -> None:
        """Check that all rows have the run's agent loop and tools: the teacher's prompt lists one set of tools."""
        has_tools = bool(self.tool_config_path or self.function_tool_path)
        expected = TOOL_TURNS if has_tools else SINGLE_TURN
        known = (expected, AGENT_LOOPS[expected])
        for name in rows.unique(AGENT_NAME) if AGENT_NAME in rows.column_names else ():
            if name not in known:
                raise DataError(
                    f"{self._files}: column {AGENT_NAME} has {name!r}, but {MULTI_TURN}.enable="
                    f"{str(has_tools).lower()} needs {' or '.join(known)}; change or drop the column"
                )
        if has_tools and "tool_selection" in (rows.features.get("extra_info") or ()):
            chosen = [number for number, info in enumerate(rows["extra_info"]) if info and info["tool_selection"]]
            if chosen:
                raise DataError(
                    f"{self._files}: row {chosen[0]}: extra_info.tool_selection is not supported, since all rows have "
                    "the same tools; drop it"
                )

    @property
    def _files(self) -> str:
        return ", ".join(map(str, self.original_data_files))

    @cached_property
    def _reader(self) -> MultimodalProcessor:
        return MultimodalProcessor(self.processor, self.config.max_pixels)

    def __getitem__(self, item: int) -> dict[str, Any]:
        row: dict[str, Any] = super().__getitem__(item)
        for name in ("reward_model", "extra_info", "tools_kwargs"):
            if isinstance(row.get(name), dict):
                row[name] = drop_nulls(row[name])
        row["tools_kwargs"] = row["tools_kwargs"] or {}
        return row

    def _build_messages(self, example: dict[str, Any], key: str) -> list[dict[str, Any]]:
        example = {**example, key: drop_nulls(example[key])}
        images = [read_image(image, self.image_key) for image in example.get(self.image_key) or ()]
        return place_images(example[key], images)

    @classmethod
    def _process_multi_modal_info(
        cls, messages: list[dict[str, Any]], image_patch_size: int, config: DictConfig
    ) -> tuple[list[Any] | None, None, None]:
        files = collect_images(messages)
        return [open_image(file, config.max_pixels) for file in files] or None, None, None


def _undecoded(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    """Keep image files encoded, where ``datasets`` would decode them."""
    feature = rows.features[column]
    if isinstance(getattr(feature, "feature", None), datasets.Image):
        return rows.cast_column(column, datasets.Sequence(datasets.Image(decode=False)))
    return rows
