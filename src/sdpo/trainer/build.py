"""From a run to the parts that the loop works with. Everything that can be refused is refused here, before training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from sdpo.config.loader import flatten_keys
from sdpo.config.root import SDPOConfig
from sdpo.errors import ConfigError
from sdpo.models.generation.sampling import SamplingParams
from sdpo.models.loading import (
    count_embeddings,
    get_stop_token_ids,
    get_window,
    load_model,
    load_tokenizer,
    require_same_vocabulary,
    resolve_device,
)
from sdpo.models.lora.adapters import require_peft
from sdpo.models.multimodal.processor import load_reader
from sdpo.models.multimodal.vision_tower import VisionAdapter, freeze_vision_tower
from sdpo.observability.health import HealthMonitor
from sdpo.observability.health_callback import HealthCallback
from sdpo.observability.progress import ProgressCallback
from sdpo.prompting.tokenization import Tokenizer
from sdpo.rewards.base import load_task, prepare_task
from sdpo.rewards.manager import RewardManager
from sdpo.trainer.actor.actor import Actor
from sdpo.trainer.checkpoint.resume import ResumeState, find_resume_state
from sdpo.trainer.checkpoint.state import (
    compute_fingerprint,
    load_student,
    load_teacher_module,
    set_random_states,
)
from sdpo.trainer.data.prompts import Prompt, RandomSampler, load_prompts
from sdpo.trainer.evaluator import Evaluator
from sdpo.trainer.logging.run_dir import RunDir, require_idle
from sdpo.trainer.rollout.base import Sampler
from sdpo.trainer.rollout.hf_engine import TransformersEngine
from sdpo.trainer.rollout.local import LocalSampler
from sdpo.trainer.rollout.process import ProcessSampler
from sdpo.trainer.rollout.vllm_engine import VllmEngine, require_vllm
from sdpo.trainer.rollout.weight_sync import copy_parameters


@dataclass(frozen=True)
class Parts:
    """The parts of a run, built and checked.

    ``tokenizer`` writes chats, images included; ``processing`` is what a checkpoint needs beside the weights.
    """

    reward_manager: RewardManager
    tokenizer: Tokenizer
    processing: PreTrainedTokenizerBase | ProcessorMixin
    prompts: list[Prompt]
    order: RandomSampler
    actor: Actor
    sampler: Sampler
    evaluator: Evaluator
    folder: RunDir
    health_callback: HealthCallback
    window: int | None
    resumption: ResumeState | None
    data: str
    num_devices: int
    observer: ProgressCallback

    def prompts_of(self, step: int) -> list[Prompt]:
        return [self.prompts[i] for i in self.order.batch(step)]


def build_parts(run: SDPOConfig, observer: ProgressCallback) -> Parts:
    """Prepare the task's files if it makes its own, load everything, open the run folder.

    Raises:
        ConfigError: see the functions called here.
    """
    if run.verl:
        observer.message(f"without effect here: verl.{', verl.'.join(flatten_keys(run.verl))}")
    if run.actor.num_threads is not None:
        torch.set_num_threads(run.actor.num_threads)
    torch.manual_seed(run.seed)
    require_idle(Path(run.output_dir))
    resumption = find_resume_state(run)
    learner_device = resolve_device(run.actor.device, "actor.device")
    sampler_device = resolve_device(run.rollout.device, "rollout.device")
    if run.rollout.engine == "vllm":
        require_vllm(sampler_device)
    if run.lora.rank:
        require_peft()
    task = load_task(run.data.task, run.data.task_args)
    prepare_task(task, observer)
    reward_manager = RewardManager(task, run.reward, observer)
    text_tokenizer = load_tokenizer(run.model)
    reader = load_reader(run.model, run.data.max_pixels)
    tokenizer: Tokenizer = reader or text_tokenizer
    if reader is not None and run.rollout.engine == "vllm":
        raise ConfigError("rollout.engine=vllm does not sample from models that read images yet; use transformers")
    student = load_student(run.model, run.lora, resumption.checkpoint if resumption else None, learner_device)
    vision = VisionAdapter(student, reader) if reader is not None else None
    if run.actor.freeze_vision_tower:
        if vision is None:
            raise ConfigError("actor.freeze_vision_tower=true, but the model has no vision tower; remove it")
        freeze_vision_tower(student)
    require_same_vocabulary(student, text_tokenizer, run.model.path)
    window = get_window(student)
    load = partial(
        load_prompts,
        config=run.data,
        tokenizer=tokenizer,
        observer=observer,
        window=window,
        max_response_length=run.rollout.max_response_length,
    )
    prompts = load(run.data.train_files, "data.train_files")
    held_out = load(run.data.val_files, "data.val_files")
    _require_known_tokens([*prompts, *held_out], count_embeddings(student))
    decoding = SamplingParams(
        n=run.rollout.n,
        max_new_tokens=run.rollout.max_response_length,
        temperature=run.rollout.temperature,
        top_p=run.rollout.top_p,
        batch_size=run.rollout.max_num_seqs,
        stop_token_ids=get_stop_token_ids(student, text_tokenizer),
        pad_token_id=int(text_tokenizer.pad_token_id),
        suppress_tokens=vision.placeholder_ids if vision is not None else (),
        dtype=getattr(torch, run.sampling_dtype) if run.sampling_dtype != run.model.dtype else None,
    )
    actor = Actor(student, run, decoding.pad_token_id, vision, observer.message)
    data = compute_fingerprint(prompts)
    if resumption is not None:
        _restore(actor, run, resumption, data)
    folder = RunDir(Path(run.output_dir), run.tracking, observer, resumption.step if resumption else None)
    folder.write_config(run)
    health_callback = HealthCallback(HealthMonitor(run.health), actor, folder.log_health_event, observer)
    if resumption is not None:
        health_callback.load_state_dict(resumption.state.health_callback)
    sampler = _build_sampler(run, student, decoding, sampler_device, window, vision)
    return Parts(
        reward_manager=reward_manager,
        tokenizer=tokenizer,
        processing=reader.processor if reader is not None else text_tokenizer,
        prompts=prompts,
        order=RandomSampler(len(prompts), run.data.train_batch_size, shuffle=run.data.shuffle, seed=run.seed),
        actor=actor,
        sampler=sampler,
        evaluator=Evaluator(run, reward_manager, tokenizer, held_out[: run.eval.max_prompts], decoding, window, vision),
        folder=folder,
        health_callback=health_callback,
        window=window,
        resumption=resumption,
        data=data,
        num_devices=len({learner_device, sampler_device}),
        observer=observer,
    )


def _restore(actor: Actor, run: SDPOConfig, resumption: ResumeState, data: str) -> None:
    state = resumption.state
    if state.data != data:
        raise ConfigError(
            "data.train_files: other rows than when the run began; restore them or begin in another output_dir"
        )
    if actor.initial is not None and not run.lora.rank:  # which was made from the student as it is now
        copy_parameters(dict(load_model(run.model, actor.device).named_parameters()), actor.initial)
    is_saved = (resumption.checkpoint / "teacher").is_dir()
    teacher = load_teacher_module(run.model, resumption.checkpoint, actor.device) if is_saved else None
    actor.load_state_dict(state.actor, teacher)
    set_random_states(state.random)


def _require_known_tokens(prompts: list[Prompt], num_embeddings: int) -> None:
    for prompt in prompts:
        largest = max(prompt.token_ids, default=0)
        if largest >= num_embeddings:
            raise ConfigError(
                f"{prompt.row.origin}: its prompt has token {largest}, and the model of model.path embeddings of "
                f"{num_embeddings}; its tokenizer's files and its weights do not belong together"
            )


def _build_sampler(
    run: SDPOConfig,
    student: PreTrainedModel,
    decoding: SamplingParams,
    device: torch.device,
    window: int | None,
    vision: VisionAdapter | None,
) -> Sampler:
    threads, config = run.rollout.num_threads, replace(run.model, dtype=run.sampling_dtype)
    if run.rollout.engine == "vllm":
        needed = run.data.max_prompt_length + run.rollout.max_response_length
        max_length = needed if window is None else min(needed, window)
        build_vllm = partial(VllmEngine, config, decoding, device, max_length, run.rollout.kv_cache_memory_gib)
        if run.max_staleness == 1:
            return ProcessSampler(
                student, build_vllm, threads, verify_weights=True, max_restarts=run.rollout.max_restarts
            )
        return LocalSampler(build_vllm(), verify_weights=True)
    build_engine = partial(TransformersEngine.from_config, config, decoding, device, run.data.max_pixels)
    if run.max_staleness == 1:
        return ProcessSampler(student, build_engine, threads, max_restarts=run.rollout.max_restarts)
    if device != student.device:
        return LocalSampler(build_engine())
    return LocalSampler(TransformersEngine(student, decoding, vision, is_student=True))
