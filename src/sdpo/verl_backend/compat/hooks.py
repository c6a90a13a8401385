"""Every non-public part of verl that sdpo depends on.

``docs/verl_hooks.md`` shows the table. ``tests/unit/verl_backend/test_hooks.py`` compares the source of each hook with
a recorded fingerprint, so that a new version of verl fails in this test, by name, and not during a run.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from dataclasses import dataclass

VERL_VERSION = "0.9.1"


@dataclass(frozen=True)
class Hook:
    """A non-public class or function of verl that sdpo subclasses, overrides, calls or replaces."""

    where: str  # module:qualified name
    how: str
    why: str


def fingerprint(where: str) -> str:
    """Return twelve hexadecimal digits of the source's SHA-256; for a class, of its ancestors' names.

    Raises:
        ImportError, AttributeError: verl no longer has it.
    """
    module, _, name = where.partition(":")
    target = importlib.import_module(module)
    for part in name.split("."):
        target = getattr(target, part)
    if hasattr(target, "__ray_metadata__"):
        target = target.__ray_metadata__.modified_class
    target = inspect.unwrap(target) if callable(target) else target
    if inspect.isclass(target):
        source = str([base.__name__ for base in target.__mro__])
    elif callable(target):
        source = inspect.getsource(target)
    else:
        source = type(target).__name__
    return hashlib.sha256(source.encode()).hexdigest()[:12]


_ENGINE = "verl.workers.engine.fsdp.transformer_impl"
_ONE_STEP = "verl.experimental.one_step_off_policy.ray_trainer"
_SEPARATE = "verl.experimental.separation.ray_trainer"
_PPO = "verl.trainer.ppo.ray_trainer"
_V1 = "verl.trainer.ppo.v1"
_LOOP = "verl.experimental.agent_loop.agent_loop"
_BUILDER = "verl.utils.tokenizer.continuous_token:ContinuousTokenBuilder"
_TOOLS = "verl.experimental.agent_loop.tool_agent_loop"

HOOKS: tuple[Hook, ...] = (
    # worker/engine.py, worker/teacher_engine.py
    Hook(f"{_ENGINE}:FSDPEngineWithLMHead", "subclassed", "student and teacher of one rank"),
    Hook(f"{_ENGINE}:FSDPEngine._build_model_optimizer", "extended", "builds the teacher after the student"),
    Hook(
        f"{_ENGINE}:FSDPEngine._build_module",
        "extended",
        "also builds the teacher; shares images, freezes the vision tower",
    ),
    Hook("verl.models.transformers.monkey_patch:apply_monkey_patch", "relied on", "patches attention for packed rows"),
    Hook("verl.utils.import_utils:is_trl_available", "replaced", "SDPO has no value head to patch"),
    Hook(f"{_ENGINE}:FSDPEngine._build_lora_module", "replaced", "adapters in float32, on the configured layers"),
    Hook(
        f"{_ENGINE}:FSDPEngine._build_fsdp_module", "extended", "shards the teacher too; reference policy without a GPU"
    ),
    Hook(f"{_ENGINE}:FSDPEngine.to", "extended", "offloads the teacher with the student"),
    Hook(f"{_ENGINE}:FSDPEngine.save_checkpoint", "extended", "saves the teacher"),
    Hook(f"{_ENGINE}:FSDPEngine.load_checkpoint", "extended", "loads the teacher"),
    Hook(f"{_ENGINE}:FSDPEngine.forward_backward_batch", "extended", "token weights, token budget, non-finite samples"),
    Hook("verl.utils.tensordict_utils:index_select_tensor_dict", "called", "a mini-batch without non-finite samples"),
    Hook(
        f"{_ENGINE}:FSDPEngineWithLMHead.forward_step", "replaced", "teacher, loss and old policy, without all logits"
    ),
    Hook(f"{_ENGINE}:FSDPEngineWithLMHead.prepare_model_inputs", "called", "inputs of student and teacher"),
    Hook(f"{_ENGINE}:FSDPEngineWithLMHead.prepare_model_outputs", "rewritten", "log-probabilities and entropies"),
    Hook("verl.utils.fsdp_utils:apply_fsdp2", "relied on", "gathers the output layer while it runs"),
    Hook("verl.workers.engine.utils:prepare_micro_batches", "relied on", "splits by the token budget that sdpo lowers"),
    Hook("verl.workers.engine.utils:postprocess_batch_func", "relied on", "concatenates micro-batches"),
    Hook("verl.utils.checkpoint.fsdp_checkpoint_manager:FSDPCheckpointManager", "called", "the teacher's shards"),
    # worker/lora.py
    Hook(f"{_ENGINE}:FSDPEngine._merged_lora_per_tensor_param", "relied on", "merged weights for the weight sync"),
    Hook("verl.utils.fsdp_utils:merged_lora_context", "relied on", "merges in shards and restores the base weights"),
    Hook(f"{_ENGINE}:FSDPEngine.disable_adapter", "relied on", "the reference policy of an actor with adapters"),
    # worker/vision_tower.py
    Hook("verl.models.transformers.qwen2_vl:_get_input_embeds", "relied on", "calls the tower's replaced forward pass"),
    Hook("verl.models.transformers.qwen3_vl:_get_input_embeds", "relied on", "calls the tower's replaced forward pass"),
    Hook("verl.utils.transformers_compat:unpack_visual_output", "called", "tokens and deepstack features of a tower"),
    Hook("verl.utils.model:extract_multi_modal_inputs", "relied on", "concatenated images of a micro-batch"),
    # compat/workarounds.py
    Hook(
        "verl.workers.utils.padding:left_right_2_no_padding", "relied on", "builds the position ids that sdpo repairs"
    ),
    Hook(
        "verl.utils.tensordict_utils:maybe_fix_3d_position_ids", "relied on", "marks the position ids that sdpo repairs"
    ),
    # driver/dataset.py
    Hook("verl.utils.dataset.rl_dataset:RLHFDataset", "subclassed", "opens images"),
    Hook("verl.utils.dataset.rl_dataset:RLHFDataset._read_files_and_tokenize", "extended", "the first rows"),
    Hook(
        "verl.utils.dataset.rl_dataset:RLHFDataset.maybe_filter_out_long_prompts", "extended", "reports unreadable rows"
    ),
    Hook("verl.utils.dataset.rl_dataset:RLHFDataset._build_messages", "replaced", "image files in content parts"),
    Hook("verl.utils.dataset.rl_dataset:RLHFDataset._process_multi_modal_info", "replaced", "sdpo's pixels"),
    # rollout/agent_loop.py
    Hook(f"{_LOOP}:AgentLoopBase.ct_build_initial_tokens", "relied on", "encodes prompts by the builder"),
    Hook(f"{_BUILDER}.build_initial_tokens", "replaced", "encodes prompts"),
    Hook(f"{_BUILDER}._render_tokens", "replaced", "encodes tools' outputs"),
    Hook(
        "verl.experimental.agent_loop.single_turn_agent_loop:SingleTurnAgentLoop",
        "subclassed",
        "no image tokens in responses",
    ),
    Hook(
        "verl.experimental.agent_loop.single_turn_agent_loop:SingleTurnAgentLoop.run",
        "extended",
        "no image tokens in responses",
    ),
    Hook(f"{_TOOLS}:ToolAgentLoop", "subclassed", "turns with tools between them"),
    Hook(f"{_TOOLS}:ToolAgentLoop.run", "extended", "no image tokens in responses or tools' outputs"),
    Hook(f"{_TOOLS}:ToolAgentLoop._call_tool", "extended", "no images from tools"),
    Hook(f"{_TOOLS}:ToolAgentLoop._handle_pending_state", "relied on", "lists the tools in the student's prompt"),
    Hook(f"{_TOOLS}:ToolAgentLoop._handle_processing_tools_state", "relied on", "masks a tool's output"),
    Hook("verl.experimental.agent_loop.agent_loop:_agent_loop_registry", "extended", "sdpo's loops under verl's names"),
    Hook(
        f"{_LOOP}:AgentLoopWorker._compute_position_ids",
        "relied on",
        "positions of images",
    ),
    Hook(
        f"{_LOOP}:AgentLoopWorker._compute_multi_modal_inputs",
        "relied on",
        "their pixels",
    ),
    # rollout/agent_workers.py
    Hook(f"{_LOOP}:AgentLoopManager", "subclassed", "chooses the workers"),
    Hook(f"{_LOOP}:AgentLoopManager.__init__", "extended", "chooses the workers"),
    Hook(f"{_LOOP}:AgentLoopWorker", "subclassed", "failed rewards"),
    Hook(f"{_LOOP}:AgentLoopWorker._run_agent_loop", "extended", "agent loops that fail"),
    Hook(f"{_LOOP}:AgentLoopWorker._compute_score", "extended", "reward functions that fail"),
    Hook(f"{_LOOP}:AgentLoopWorker._postprocess", "extended", "same columns for all responses"),
    Hook(f"{_LOOP}:AgentLoopWorker._agent_loop_postprocess", "called", "a failed response"),
    Hook(f"{_V1}.agent_loop_tq:AgentLoopManagerTQ", "subclassed", "chooses the workers"),
    Hook(f"{_V1}.agent_loop_tq:AgentLoopManagerTQ.__init__", "extended", "chooses the workers"),
    Hook(f"{_V1}.agent_loop_tq:AgentLoopWorkerTQ", "subclassed", "failed rewards"),
    Hook(f"{_V1}.agent_loop_tq:AgentLoopWorkerTQ._agent_loop_postprocess", "called", "a failed response"),
    Hook(
        "verl.experimental.reward_loop.reward_manager.naive:NaiveRewardManager.run_single",
        "relied on",
        "calls the reward function in threads",
    ),
    # driver/tools.py
    Hook("verl.tools.tool_registry:load_all_tools", "called", "the tools that the teacher's prompt lists"),
    Hook("verl.experimental.agent_loop.tool_parser:ToolParser._registry", "read", "refuses an unknown parser"),
    # worker/worker.py
    Hook("verl.workers.engine_workers:TrainingWorker", "subclassed", "passes settings to the engine"),
    Hook(
        "verl.workers.engine_workers:TrainingWorker.train_mini_batch",
        "extended",
        "updates the teacher before offloading",
    ),
    Hook("verl.experimental.separation.engine_workers:DetachActorWorker", "subclassed", "chooses the worker"),
    Hook(
        "verl.workers.engine_workers:ActorRolloutRefWorker.init_model",
        "extended",
        "worker classes",
    ),
    Hook("verl.workers.engine_workers:ActorRolloutRefWorker.compute_ref_log_prob", "relied on", "KL to a reference"),
    Hook("verl.trainer.ppo.core_algos:kl_penalty", "rewritten", "estimates of that KL"),
    # driver/one_step_off_trainer.py, driver/health.py
    Hook(f"{_ONE_STEP}:OneStepOffRayTrainer", "subclassed", "one step off policy"),
    Hook(f"{_ONE_STEP}:OneStepOffRayTrainer._create_continuous_iterator", "replaced", "keeps errors and epochs"),
    Hook(f"{_ONE_STEP}:OneStepOffRayTrainer._async_gen_next_batch", "extended", "raises errors; resumes"),
    Hook(f"{_ONE_STEP}:OneStepOffRayTrainer._fit_generate", "extended", "the metric of the epoch"),
    Hook(f"{_ONE_STEP}:OneStepOffRayTrainer.fit_step", "extended", "saves the batch sampled ahead; validates"),
    Hook(f"{_ONE_STEP}:OneStepOffRayTrainer.fit", "relied on", "the order of a step"),
    Hook(f"{_SEPARATE}:SeparateRayPPOTrainer._fit_validate", "postponed", "validates the weights after the update"),
    Hook(f"{_SEPARATE}:SeparateRayPPOTrainer._fit_postprocess_step", "postponed", "logs after the validation"),
    Hook(f"{_SEPARATE}:SeparateRayPPOTrainer._fit_update_weights", "called", "syncs the weights to validate"),
    Hook(f"{_SEPARATE}:SeparateRayPPOTrainer._fit_compute_reward", "extended", "the teacher's batch"),
    Hook(f"{_SEPARATE}:SeparateRayPPOTrainer._fit_compute_advantage", "extended", "failed rewards"),
    Hook(f"{_SEPARATE}:SeparateRayPPOTrainer._fit_collect_metrics", "extended", "failed rewards"),
    Hook(f"{_PPO}:RayPPOTrainer._val_metrics_update", "extended", "failed rewards"),
    Hook(f"{_SEPARATE}:SeparateRayPPOTrainer._fit_update_actor", "extended", "names of metrics; health checks"),
    Hook(f"{_PPO}:RayPPOTrainer._save_checkpoint", "extended", "position in the data; health checks"),
    Hook(f"{_PPO}:RayPPOTrainer._load_checkpoint", "extended", "the batch sampled ahead; health checks"),
    Hook(f"{_PPO}:RayPPOTrainer._validate", "extended", "the accuracy of a checkpoint"),
    Hook(
        "verl.utils.checkpoint.checkpoint_manager:BaseCheckpointManager.register_checkpoint",
        "relied on",
        "removes no checkpoint without a limit",
    ),
    Hook(f"{_PPO}:RayPPOTrainer._init_dump_executor", "called", "rollout_data_dir"),
    Hook(f"{_PPO}:RayPPOTrainer._shutdown_dump_executor", "called", "rollout_data_dir"),
    Hook(f"{_PPO}:RayPPOTrainer._update_actor", "relied on", "fields of the batch reach the engine"),
    # driver/v1_trainers.py
    Hook(f"{_V1}.trainer_sync:PPOTrainerSync", "subclassed", "sampling and training in turns"),
    Hook(f"{_V1}.trainer_separate_async:PPOTrainerSeparateAsync", "subclassed", "two pools of GPUs"),
    Hook(f"{_V1}.trainer_separate_async:logger", "replaced", "a call of it raises"),
    Hook(f"{_V1}.trainer_base:PPOTrainer._setup", "extended", "the teacher's batch; health checks"),
    Hook(f"{_V1}.trainer_base:PPOTrainer.step", "extended", "health checks"),
    Hook(f"{_V1}.trainer_base:PPOTrainer.fit", "relied on", "ends after the step that a health check makes the last"),
    Hook(f"{_V1}.trainer_base:PPOTrainer._save_checkpoint", "extended", "health checks"),
    Hook(f"{_V1}.trainer_base:PPOTrainer._validate", "extended", "the accuracy of a checkpoint"),
    Hook(f"{_V1}.trainer_base:PPOTrainer._init_resource_pool_mgr", "extended", "sdpo's worker"),
    Hook(f"{_V1}.trainer_base:PPOTrainer._compute_advantage", "extended", "the teacher's batch"),
    Hook(f"{_V1}.trainer_base:PPOTrainer._update_actor", "extended", "names of metrics"),
    Hook(f"{_V1}.trainer_base:PPOTrainer._compute_metrics", "extended", "failed rewards; clip ratio"),
    Hook(f"{_V1}.trainer_base:PPOTrainer._val_metrics_update", "extended", "failed rewards"),
    Hook("verl.trainer.ppo.padding_utils:construct_minimal_padding_template", "relied on", "is_padding"),
    Hook(f"{_V1}.trainer_base:TRAINER_REGISTRY", "replaced", "sdpo's trainers under verl's names"),
    Hook("verl.trainer.main_ppo:TaskRunnerV1", "called", "verl's runner, as a plain class"),
    # entrypoint/
    Hook("verl.trainer.main_ppo:run_ppo", "called", "starts Ray"),
    Hook("verl.experimental.one_step_off_policy.main_ppo:OneStepTaskRunner", "rewritten", "constructs sdpo's trainer"),
    Hook("verl.utils.config:validate_config", "called", "verl's own checks, before Ray"),
    Hook("verl.utils.tokenizer.tokenizer:hf_processor", "called", "refuses models without a processor"),
    # cpu/
    Hook("verl.plugin.platform.platform_base:PlatformBase", "subclassed", "a device named cpu"),
    Hook("verl.checkpoint_engine.base:CheckpointEngine", "subclassed", "weight sync through a file"),
    Hook("verl.workers.rollout.replica:RolloutReplica", "subclassed", "samples with transformers"),
    Hook("verl.workers.rollout.base:BaseRollout", "subclassed", "passes weights to the sampler"),
    Hook("verl.workers.rollout.base:_ROLLOUT_REGISTRY", "extended", "the sampler's name"),
)
