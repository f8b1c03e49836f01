"""Converts our configuration to DeepSpeed's, and refuses DeepSpeed settings that do not work with it."""

from typing import Any

from megamtp.config import Config
from megamtp.errors import InputError
from megamtp.model.cost import num_head_parameters, num_layer_parameters, num_unembedding_parameters

# Sections of engine.deepspeed. None of their settings changes the training, except for those in REFUSED.
ALLOWED = (
    "zero_optimization",
    "fp16",
    "bf16",
    "data_types",
    "wall_clock_breakdown",
    "memory_breakdown",
    "comms_logger",
)

# DeepSpeed settings that break sequential heads or silently change the training, with the reason.
REFUSED = {
    "train_batch_size": "megamtp derives it from train.global_batch_tokens",
    "elasticity": "the launcher sets the number of ranks",
    "compression_training": "it replaces the heads' modules",
    "compile": "DeepCompile removes the module hooks that gather the heads' weights",
    "optimizer": "megamtp builds the optimizer; set optimizer.*",
    "scheduler": "megamtp sets the learning rate; set optimizer.*",
    "pipeline": "set engine.kind=pipeline instead",
    "zenflow": "its backward hooks miss the heads' backward passes",
    "hybrid_engine": "it replaces the heads' modules",
    "tensor_parallel": "it replaces the heads' modules",
    "torch_autocast": "it changes the precision inside the fused loss; set train.precision",
    "amp": "it changes the precision inside the fused loss; set train.precision",
    "sparse_gradients": "the embedding's gradient is dense",
    "progressive_layer_drop": "it passes arguments that the model does not have",
    "curriculum_learning": "megamtp sets the data order, so that runs can be resumed",
    "data_efficiency": "megamtp sets the data order, so that runs can be resumed",
    "prescale_gradients": "the loss is normalised globally before the reduction",
    "gradient_predivide_factor": "the loss is normalised globally before the reduction",
    "managed_gradient_accumulation": "megamtp marks the last micro-batch itself",
    "sequence_parallel_size": "attention needs whole sequences",
    "expert_parallel": "the model has no experts",
    "zero_optimization.zenflow": "its backward hooks miss the heads' backward passes",
    "zero_optimization.round_robin_gradients": "checkpoints would store weights under the names of other parameters",
    "zero_optimization.compute_grad_norm": "every step reports the gradient norm",
    "zero_optimization.module_granularity_threshold": "megamtp gathers whole layers",
    "zero_optimization.leaf_module": "megamtp gathers whole layers",
    "zero_optimization.cpu_offload": "set engine.offload_optimizer",
    "zero_optimization.offload_optimizer.ratio": "the optimizer is offloaded entirely, or not at all",
    "zero_optimization.offload_optimizer.super_offload": "the optimizer is torch's AdamW",
    "zero_optimization.legacy_stage1": "DeepSpeed no longer maintains it",
    "zero_optimization.zeropp_loco_param": "quantised reductions are not supported",
    "fp16.fp16_master_weights_and_grads": "master weights are fp32",
    "bf16.bf16_master_weights_and_grads": "master weights are fp32",
    "zero_optimization.zero_hpz_partition_size": "hpZ is not supported",
    "zero_optimization.zero_quantized_weights": "set train.precision=fp8, which gathers weights in fp8",
    "zero_optimization.zero_quantized_nontrainable_weights": "quantised gathers are not supported",
    "zero_optimization.zero_quantized_gradients": "quantised reductions are not supported",
    "zero_optimization.mics_shard_size": "MiCS is not supported",
    "zero_optimization.mics_hierarchical_params_gather": "MiCS is not supported",
    "zero_optimization.offload_param.device": "set engine.offload_parameters (CPU only; NVMe is not supported)",
    "zero_optimization.offload_optimizer.device": "set engine.offload_optimizer (CPU only; NVMe is not supported)",
}


def deepspeed_config(config: Config, data_parallel_size: int) -> dict[str, Any]:
    """Returns the configuration for deepspeed.initialize and zero.Init.

    Raises:
        InputError: engine.deepspeed has a setting that megamtp sets itself, or one of REFUSED.
    """
    dtype = config.train.dtype
    ours = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.num_micro_batches(data_parallel_size),
        "gradient_clipping": config.optimizer.gradient_clipping,  # explicit: DeepSpeed's default is 1.0, not off
        "steps_per_print": 10**9,
        # DeepSpeed's default makes the CPU wait for the GPU before and after every micro-batch.
        "timers": {"throughput": {"enabled": False}},
        "zero_allow_untested_optimizer": True,  # any element-wise optimizer works
        "zero_force_ds_cpu_optimizer": False,  # offloaded steps use torch's fused AdamW, which needs no compiler
        "bf16": _bf16_settings(config),
        "fp16": {"enabled": dtype == "fp16"},
        "data_types": {"grad_accum_dtype": "fp32"},  # explicit: DeepSpeed's default is the model's dtype
        "communication_data_type": config.engine.reduce_dtype or dtype,
        "zero_optimization": _zero_settings(config),
    }
    _refuse(config.engine.deepspeed, "")
    merged = _merged(ours, config.engine.deepspeed, "")
    for key in config.engine.deepspeed:
        if key not in ALLOWED:
            raise InputError(
                f"engine.deepspeed.{key} is not supported; expected one of {', '.join(ALLOWED)}: remove it"
            )
    if config.engine.deepspeed:
        _check_with_deepspeed(merged)
    return merged


def _bf16_settings(config: Config) -> dict[str, Any]:
    settings: dict[str, Any] = {"enabled": config.train.dtype == "bf16"}
    if config.engine.kind == "pipeline":
        # Every gradient is added to its fp32 sum at once, so that a pipeline does not need correction (d) of
        # head_hooks.py.
        settings["immediate_grad_update"] = True
    return settings


def _zero_settings(config: Config) -> dict[str, Any]:
    engine, model = config.engine, config.model
    settings: dict[str, Any] = {
        "stage": 3 if engine.kind == "zero3" else 1,
        "overlap_comm": engine.kind != "pipeline",  # a pipeline reduces only after the last backward pass
        # Copies gradients to one buffer. Grouped communication and pipelines reduce them where they are.
        "contiguous_gradients": engine.kind == "zero1"
        or (engine.kind == "zero3" and engine.communication == "deepspeed"),
        "reduce_scatter": True,
        "reduce_bucket_size": engine.reduce_bucket_size,
    }
    if engine.offload_optimizer:
        settings["offload_optimizer"] = {"device": "cpu"}
    if engine.kind == "zero3":
        layer, unembedding = num_layer_parameters(model), num_unembedding_parameters(model)
        head = max(num_head_parameters(model, index) for index in range(model.num_future_tokens))
        num_unembeddings = 1 if model.unembedding == "shared" else 2
        settings |= {
            # Prefetch one layer: head i + 1 is gathered while head i computes.
            "stage3_prefetch_bucket_size": max(layer, head),
            # A trunk layer, two heads and their unembeddings.
            "stage3_max_live_parameters": layer + 2 * head + num_unembeddings * unembedding,
            # Release weights after each use, also if the next use is near: backward gathers them again.
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": engine.param_persistence_threshold,
            # DeepSpeed's own linear function would make torch.compile compile every layer separately.
            "memory_efficient_linear": False,
        }
        if engine.offload_parameters:
            settings["offload_param"] = {"device": "cpu"}
    return settings


def _check_with_deepspeed(settings: dict[str, Any]) -> None:
    """Raises InputError for settings that DeepSpeed rejects, instead of DeepSpeed's traceback."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    try:
        DeepSpeedConfig(settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise InputError(
            f"engine.deepspeed: {name}={first['input']!r}: {first['msg']}; see DeepSpeed's documentation"
        ) from None
    except Exception as error:  # any kind: DeepSpeed does not check the types of all settings
        reason = " ".join(str(error).split())
        raise InputError(
            f"DeepSpeed rejects engine.deepspeed ({reason}); expected settings of the documented types"
        ) from None


def _refuse(settings: dict[str, Any], prefix: str) -> None:
    for key, value in settings.items():
        reason = REFUSED.get(f"{prefix}{key}")
        if reason:
            raise InputError(f"engine.deepspeed.{prefix}{key} cannot be used: {reason}; remove it")
        if isinstance(value, dict):
            _refuse(value, f"{prefix}{key}.")


def _merged(ours: dict[str, Any], theirs: dict[str, Any], prefix: str) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        name = f"engine.deepspeed.{prefix}{key}"
        if isinstance(value, dict) and isinstance(ours.get(key), dict):
            merged[key] = _merged(ours[key], value, f"{prefix}{key}.")
        elif isinstance(ours.get(key), dict):
            raise InputError(f"{name} is {value!r}; expected a mapping of DeepSpeed settings")
        elif key in ours:
            raise InputError(
                f"{name} conflicts with a setting of megamtp ({ours[key]}); remove it: --help lists megamtp's settings"
            )
        else:
            merged[key] = value
    return merged
