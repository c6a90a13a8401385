"""Build the components of the native trainer from a config."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from sdpo.config.data import DataConfig
from sdpo.config.loader import flatten_keys, to_yaml
from sdpo.config.model import ModelConfig
from sdpo.config.monitoring import HealthConfig
from sdpo.config.root import UNWEIGHTED_SAMPLES, SDPOConfig
from sdpo.errors import ConfigError
from sdpo.models.loading import (
    count_embeddings,
    get_window,
    load_model,
    load_tokenizer,
    require_same_vocabulary,
    resolve_device,
)
from sdpo.models.lora.adapters import require_peft
from sdpo.models.multimodal.processor import load_reader
from sdpo.models.multimodal.vision_tower import VisionAdapter, freeze_vision_tower
from sdpo.models.saving import rehearse_save
from sdpo.models.self_check import check_exactness
from sdpo.observability.health import HealthMonitor
from sdpo.observability.health_callback import HealthCallback
from sdpo.observability.progress import ProgressCallback
from sdpo.observability.run_folder import require_idle
from sdpo.prompting.demonstrations import shows_ground_truth
from sdpo.prompting.run_date import begin_run
from sdpo.prompting.tokenization import Tokenizer
from sdpo.rewards.base import load_task, prepare_task
from sdpo.rewards.manager import RewardManager
from sdpo.trainer.actor.actor import Actor
from sdpo.trainer.actor.build import build_actor
from sdpo.trainer.actor.health_actions import ActorHealthActions
from sdpo.trainer.checkpoint.resume import ResumeState, find_resume_state
from sdpo.trainer.checkpoint.state import (
    compute_fingerprints,
    load_student,
    load_teacher_module,
    set_random_states,
)
from sdpo.trainer.data.prompts import Prompt, RandomSampler, load_prompts
from sdpo.trainer.evaluator import Evaluator
from sdpo.trainer.logging.run_dir import RunDir
from sdpo.trainer.rollout.base import Sampler
from sdpo.trainer.rollout.build import ENGINES, build_sampler, build_sampling_params
from sdpo.trainer.rollout.weight_sync import copy_parameters

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainerComponents:
    """The components of a run, built and checked.

    Attributes:
        tokenizer: applies the chat template, with images.
        processing: the tokenizer or processor that a checkpoint includes.
        window: maximum sequence length of the model; None if its config does not say.
        data: fingerprints of what the run is trained on.
        num_devices: devices that train or sample.
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
    health_actions: ActorHealthActions
    health_callback: HealthCallback
    window: int | None
    resume_state: ResumeState | None
    data: dict[str, str]
    num_devices: int

    def prompts_of(self, step: int) -> list[Prompt]:
        """The prompts of a step, in order."""
        return [self.prompts[i] for i in self.order.batch(step)]


def build_components(config: SDPOConfig, progress: ProgressCallback) -> TrainerComponents:
    """Build and check everything that a run needs, before training.

    Raises:
        SDPOError: see the functions called here.
    """
    if config.verl:
        logger.warning("ignored by the native trainer: verl.%s", ", verl.".join(flatten_keys(config.verl)))
    if config.trains_without_weights:
        logger.warning(UNWEIGHTED_SAMPLES)
    if config.actor.num_threads is not None:
        torch.set_num_threads(config.actor.num_threads)
    torch.manual_seed(config.seed)
    require_idle(Path(config.output_dir))
    resume_state = find_resume_state(config)
    checkpoint = resume_state.checkpoint if resume_state else None
    begin_run(resume_state.state.date if resume_state else None)
    actor_device = resolve_device(config.actor.device, "actor.device")
    sampler_device = resolve_device(config.rollout.device, "rollout.device")
    engine = ENGINES[config.rollout.engine]
    engine.require(sampler_device)
    if config.lora.rank:
        require_peft()
    task = load_task(config.data.task, config.data.task_args)
    prepare_task(task, progress)
    reward_manager = RewardManager(task, config.reward)

    text_tokenizer = load_tokenizer(config.model)
    reader = load_reader(config.model, config.data.max_pixels)
    if reader is not None and not engine.reads_images:
        raise ConfigError(
            f"rollout.engine={config.rollout.engine} does not sample from models that read images yet; use transformers"
        )
    tokenizer: Tokenizer = reader or text_tokenizer
    student = load_student(config.model, config.lora, checkpoint, actor_device)
    require_same_vocabulary(student, text_tokenizer, config.model.path)
    vision = VisionAdapter(student, reader) if reader is not None else None
    if config.actor.freeze_vision_tower:
        _freeze_vision_tower(student, vision)
    window = get_window(student)
    shows_solution = shows_ground_truth(config.self_distillation)
    prompts, validation = _load_prompts(
        config.data, tokenizer, progress, window, config.rollout.max_response_length, shows_solution=shows_solution
    )
    _require_known_tokens([*prompts, *validation], count_embeddings(student))

    sampling_dtype = config.sampling_dtype if config.sampling_dtype != config.model.dtype else None
    sampling = build_sampling_params(config.rollout, student, text_tokenizer, vision, sampling_dtype)
    check_exactness(student, int(text_tokenizer.pad_token_id))
    actor = build_actor(student, config, sampling.pad_token_id, vision, sampling.suppress_tokens)
    if resume_state is not None and actor.initial is not None and not config.lora.rank:
        # build_actor copied it from the resumed student
        copy_parameters(dict(load_model(config.model, actor.device).named_parameters()), actor.initial)
    data = compute_fingerprints(prompts, config.data.task, student if config.lora.rank else actor.initial)
    if resume_state is not None:
        _restore(actor, config.model, resume_state, data)
    processing = reader.processor if reader is not None else text_tokenizer
    _rehearse_save(student, processing)
    folder = RunDir(Path(config.output_dir), config.tracking, progress, resume_state.step if resume_state else None)
    folder.write_config(to_yaml(config), asdict(config))
    health_actions, health_callback = _build_health(config.health, actor, folder, resume_state)
    evaluator = Evaluator(
        config.eval,
        config.self_distillation,
        reward_manager,
        tokenizer,
        validation[: config.eval.max_prompts],
        sampling,
        window,
        vision,
    )
    needed = config.data.max_prompt_length + config.rollout.max_response_length
    sampler = build_sampler(
        config.rollout,
        replace(config.model, dtype=config.sampling_dtype),
        student,
        sampling,
        sampler_device,
        vision,
        max_length=needed if window is None else min(needed, window),
        max_pixels=config.data.max_pixels,
        overlaps=config.max_staleness == 1,
    )
    return TrainerComponents(
        reward_manager=reward_manager,
        tokenizer=tokenizer,
        processing=processing,
        prompts=prompts,
        order=RandomSampler(len(prompts), config.data.train_batch_size, shuffle=config.data.shuffle, seed=config.seed),
        actor=actor,
        sampler=sampler,
        evaluator=evaluator,
        folder=folder,
        health_actions=health_actions,
        health_callback=health_callback,
        window=window,
        resume_state=resume_state,
        data=data,
        num_devices=len({actor_device, sampler_device}),
    )


def _freeze_vision_tower(student: PreTrainedModel, vision: VisionAdapter | None) -> None:
    if vision is None:
        raise ConfigError("actor.freeze_vision_tower=true, but the model has no vision tower; remove it")
    freeze_vision_tower(student)


def _load_prompts(
    config: DataConfig,
    tokenizer: Tokenizer,
    progress: ProgressCallback,
    window: int | None,
    max_response_length: int,
    *,
    shows_solution: bool,
) -> tuple[list[Prompt], list[Prompt]]:
    """Load the prompts of training and of validation."""
    load = partial(
        load_prompts,
        config=config,
        tokenizer=tokenizer,
        progress=progress,
        window=window,
        max_response_length=max_response_length,
        shows_solution=shows_solution,
    )
    train, validation = load(config.train_files, "data.train_files"), load(config.val_files, "data.val_files")
    if len(train) < config.train_batch_size:
        logger.warning(
            "data.train_files: %d rows for data.train_batch_size=%d, so rows repeat within a step",
            len(train),
            config.train_batch_size,
        )
    return train, validation


def _rehearse_save(student: PreTrainedModel, processing: PreTrainedTokenizerBase | ProcessorMixin) -> None:
    with tempfile.TemporaryDirectory(prefix="sdpo-save-") as scratch:
        rehearse_save(student, processing, Path(scratch))


def _build_health(
    config: HealthConfig, actor: Actor, folder: RunDir, resume_state: ResumeState | None
) -> tuple[ActorHealthActions, HealthCallback]:
    actions = ActorHealthActions(actor, config)
    callback = HealthCallback(HealthMonitor(config), actions, folder.log_health_event)
    if resume_state is not None:
        callback.load_state_dict(resume_state.state.health_callback)
        actions.best_weights = resume_state.state.best_weights
    return actions, callback


def _restore(actor: Actor, config: ModelConfig, resume_state: ResumeState, data: dict[str, str]) -> None:
    state = resume_state.state
    saved = state.data if isinstance(state.data, dict) else {}  # a text in checkpoints of earlier versions
    changed = [name for name, value in data.items() if saved.get(name) != value]
    if changed:
        raise ConfigError(
            f"output_dir: {resume_state.checkpoint} was trained with another state of {', '.join(changed)}; restore "
            "it, or use another output_dir"
        )
    is_saved = (resume_state.checkpoint / "teacher").is_dir()
    teacher = load_teacher_module(config, resume_state.checkpoint, actor.device) if is_saved else None
    actor.load_state_dict(state.actor, teacher)
    set_random_states(state.random)


def _require_known_tokens(prompts: list[Prompt], num_embeddings: int) -> None:
    for prompt in prompts:
        largest = max(prompt.token_ids, default=0)
        if largest >= num_embeddings:
            raise ConfigError(
                f"{prompt.row.origin}: its prompt has token {largest}, but the model of model.path has only "
                f"{num_embeddings} embeddings; its tokenizer's files and its weights do not belong together"
            )
