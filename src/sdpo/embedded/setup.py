"""From a run to the parts that the loop works with. Everything that can be refused is refused here, before training."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from sdpo.config import Run, flatten_keys
from sdpo.context.encode import Tokenizer
from sdpo.embedded.alarms import ALARMS_FILE, Guard
from sdpo.embedded.data import Prompt, PromptOrder, load_prompts
from sdpo.embedded.evaluation import Evaluator
from sdpo.embedded.learner import Learner
from sdpo.embedded.run_folder import RunFolder
from sdpo.embedded.sampler import LocalSampler, ProcessSampler, Sampler, TransformersEngine
from sdpo.embedded.vllm_engine import VllmEngine, require_vllm
from sdpo.errors import UserError
from sdpo.health import HealthMonitor
from sdpo.models.decoding import Decoding
from sdpo.models.loading import get_stop_token_ids, get_window, load_model, load_tokenizer, resolve_device
from sdpo.models.processing import load_reader
from sdpo.models.vision import Vision, freeze_tower
from sdpo.observer import Observer
from sdpo.tasks.interface import Task, load_task, prepare_task


@dataclass(frozen=True)
class Parts:
    """The parts of a run, built and checked.

    ``tokenizer`` writes chats, images included; ``processing`` is what a checkpoint needs beside the weights.
    """

    task: Task
    tokenizer: Tokenizer
    processing: PreTrainedTokenizerBase | ProcessorMixin
    prompts: list[Prompt]
    order: PromptOrder
    learner: Learner
    sampler: Sampler
    evaluator: Evaluator
    folder: RunFolder
    guard: Guard
    window: int | None

    def prompts_of(self, step: int) -> list[Prompt]:
        return [self.prompts[i] for i in self.order.batch(step)]


def build_parts(run: Run, observer: Observer) -> Parts:
    """Prepare the task's files if it makes its own, load everything, open the run folder.

    Raises:
        UserError: see the functions called here.
    """
    if run.verl:
        observer.message(f"without effect here: verl.{', verl.'.join(flatten_keys(run.verl))}")
    if run.learner.num_threads is not None:
        torch.set_num_threads(run.learner.num_threads)
    torch.manual_seed(run.seed)
    learner_device = resolve_device(run.learner.device, "learner.device")
    sampler_device = resolve_device(run.sampler.device, "sampler.device")
    if run.sampler.engine == "vllm":
        require_vllm(sampler_device)
    task = load_task(run.data.task, run.data.task_args)
    prepare_task(task, observer)
    text_tokenizer = load_tokenizer(run.model)
    reader = load_reader(run.model, run.data.max_pixels)
    tokenizer: Tokenizer = reader or text_tokenizer
    if reader is not None and run.sampler.engine == "vllm":
        raise UserError("sampler.engine=vllm does not sample from models that read images yet; use transformers")
    student = load_model(run.model, learner_device)
    vision = Vision(student, reader) if reader is not None else None
    if run.learner.freeze_vision:
        if vision is None:
            raise UserError("learner.freeze_vision=true, but the model has no image tower; remove it")
        freeze_tower(student)
    window = get_window(student)
    prompts = load_prompts(run.data.train_files, "data.train_files", run, tokenizer, window, observer)
    held_out = load_prompts(run.data.val_files, "data.val_files", run, tokenizer, window, observer)
    decoding = Decoding(
        n=run.sampler.n,
        max_new_tokens=run.sampler.max_response_length,
        temperature=run.sampler.temperature,
        top_p=run.sampler.top_p,
        batch_size=run.sampler.batch_size,
        stop_token_ids=get_stop_token_ids(student, text_tokenizer),
        pad_token_id=int(text_tokenizer.pad_token_id),
        forbidden_token_ids=vision.placeholder_ids if vision is not None else (),
    )
    learner = Learner(student, run, decoding.pad_token_id, vision)
    folder = RunFolder(run, observer)
    sampler = _build_sampler(run, student, decoding, sampler_device, window, vision)
    return Parts(
        task=task,
        tokenizer=tokenizer,
        processing=reader.processor if reader is not None else text_tokenizer,
        prompts=prompts,
        order=PromptOrder(len(prompts), run.data.train_batch_size, shuffle=run.data.shuffle, seed=run.seed),
        learner=learner,
        sampler=sampler,
        evaluator=Evaluator(run, task, tokenizer, held_out[: run.eval.max_prompts], decoding, window, vision),
        folder=folder,
        guard=Guard(HealthMonitor(run.health), learner, folder.path / ALARMS_FILE, observer),
        window=window,
    )


def _build_sampler(
    run: Run,
    student: PreTrainedModel,
    decoding: Decoding,
    device: torch.device,
    window: int | None,
    vision: Vision | None,
) -> Sampler:
    if run.sampler.engine == "vllm":
        needed = run.data.max_prompt_length + run.sampler.max_response_length
        max_length = needed if window is None else min(needed, window)
        build_vllm = partial(VllmEngine, run.model, decoding, device, max_length, run.sampler.kv_cache_gib)
        if run.staleness == 1:
            return ProcessSampler(student, build_vllm, run.sampler.num_threads, probes=True)
        return LocalSampler(build_vllm(), probes=True)
    build_engine = partial(TransformersEngine.from_config, run.model, decoding, device, run.data.max_pixels)
    if run.staleness == 1:
        return ProcessSampler(student, build_engine, run.sampler.num_threads)
    return LocalSampler(build_engine() if device != student.device else TransformersEngine(student, decoding, vision))
