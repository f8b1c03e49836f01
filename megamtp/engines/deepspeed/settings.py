"""Our configuration -> DeepSpeed's, and the refusal of what cannot work beside it."""

from typing import Any

from megamtp.config import Config
from megamtp.errors import InputError
from megamtp.model.cost import head_parameters, layer_parameters, unembedding_parameters

# DeepSpeed settings that may be passed through: none of them changes what is trained, unless it is named below.
PASSED_ON = (
    "zero_optimization",
    "fp16",
    "bf16",
    "data_types",
    "wall_clock_breakdown",
    "memory_breakdown",
    "comms_logger",
)

# DeepSpeed settings that break sequential heads or would silently change what is trained, and why.
REFUSED = {
    "train_batch_size": "it follows from train.global_batch_tokens",
    "elasticity": "the number of ranks is the launcher's",
    "compression_training": "it replaces the modules that the heads are",
    "compile": "DeepCompile removes the module hooks that fetch the heads' weights",
    "optimizer": "megamtp builds the optimizer; set optimizer.*",
    "scheduler": "megamtp sets the learning rate; set optimizer.*",
    "pipeline": "the pipeline engine is not chosen by DeepSpeed's settings",
    "zenflow": "its own backward hooks do not see the heads' backward passes",
    "hybrid_engine": "it replaces the modules that the heads are",
    "tensor_parallel": "it replaces the modules that the heads are",
    "torch_autocast": "it changes precision inside the fused loss; set train.precision",
    "amp": "it changes precision inside the fused loss; set train.precision",
    "sparse_gradients": "the embedding's gradient is dense here",
    "progressive_layer_drop": "it passes arguments that the model does not take",
    "curriculum_learning": "the data order is megamtp's, so that runs can be resumed",
    "data_efficiency": "the data order is megamtp's, so that runs can be resumed",
    "prescale_gradients": "the loss is normalised globally before the reduction",
    "gradient_predivide_factor": "the loss is normalised globally before the reduction",
    "managed_gradient_accumulation": "megamtp marks the last micro-batch itself",
    "sequence_parallel_size": "attention here sees whole sequences",
    "expert_parallel": "the model has no experts",
    "zero_optimization.zenflow": "its own backward hooks do not see the heads' backward passes",
    "zero_optimization.round_robin_gradients": "checkpoints would hold weights under other parameters' names",
    "zero_optimization.compute_grad_norm": "every step reports the gradient's norm",
    "zero_optimization.module_granularity_threshold": "layers are gathered whole",
    "zero_optimization.leaf_module": "layers are gathered whole",
    "zero_optimization.cpu_offload": "set engine.offload_optimizer",
    "zero_optimization.offload_optimizer.ratio": "the optimizer is offloaded whole, or not",
    "zero_optimization.offload_optimizer.super_offload": "the optimizer is torch's AdamW",
    "zero_optimization.legacy_stage1": "DeepSpeed has given it up",
    "zero_optimization.zeropp_loco_param": "gradients are reduced as they are (no quantised reductions)",
    "fp16.fp16_master_weights_and_grads": "the optimizer's weights are fp32",
    "bf16.bf16_master_weights_and_grads": "the optimizer's weights are fp32",
    "zero_optimization.zero_hpz_partition_size": "weights are gathered from one set of shards (no hpZ)",
    "zero_optimization.zero_quantized_weights": "weights are gathered as they are (no quantised gathers)",
    "zero_optimization.zero_quantized_nontrainable_weights": "weights are gathered as they are (no quantised gathers)",
    "zero_optimization.zero_quantized_gradients": "gradients are reduced as they are (no quantised reductions)",
    "zero_optimization.mics_shard_size": "shards are spread over all ranks (no MiCS)",
    "zero_optimization.mics_hierarchical_params_gather": "shards are spread over all ranks (no MiCS)",
    "zero_optimization.offload_param.device": "set engine.offload_parameters (to CPU memory; NVMe is not supported)",
    "zero_optimization.offload_optimizer.device": "set engine.offload_optimizer (to CPU memory; NVMe is not supported)",
}


def deepspeed_config(config: Config, data_parallel_size: int) -> dict[str, Any]:
    """The dictionary for deepspeed.initialize and zero.Init.

    Raises:
        InputError: engine.deepspeed names a setting of ours, or one that cannot work (REFUSED).
    """
    precision = config.train.precision
    ours = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation(data_parallel_size),
        "gradient_clipping": config.optimizer.gradient_clipping,  # explicit: DeepSpeed's default is 1.0, not off
        "steps_per_print": 10**9,
        # by default the host waits for the device around every micro-batch
        "timers": {"throughput": {"enabled": False}},
        "zero_allow_untested_optimizer": True,  # any kind that works element by element
        "zero_force_ds_cpu_optimizer": False,  # with offload torch's fused AdamW steps on the CPU: no compiler needed
        "bf16": _bf16_settings(config),
        "fp16": {"enabled": precision == "fp16"},
        "data_types": {"grad_accum_dtype": "fp32"},  # DeepSpeed's default is the model's dtype, silently
        "communication_data_type": config.engine.reduce_dtype or precision,
        "zero_optimization": _zero_settings(config),
    }
    _refuse(config.engine.deepspeed, "")
    merged = _merged(ours, config.engine.deepspeed, "")
    for key in config.engine.deepspeed:
        if key not in PASSED_ON:
            raise InputError(
                f"engine.deepspeed.{key} is not known to work; expected one of {', '.join(PASSED_ON)}: remove it"
            )
    if config.engine.deepspeed:
        _check_with_deepspeed(merged)
    return merged


def _bf16_settings(config: Config) -> dict[str, Any]:
    settings: dict[str, Any] = {"enabled": config.train.precision == "bf16"}
    if config.engine.kind == "pipeline":
        # each gradient into the fp32 sums as it appears: (d) of head_phase.py is moot
        settings["immediate_grad_update"] = True
    return settings


def _zero_settings(config: Config) -> dict[str, Any]:
    engine, model = config.engine, config.model
    settings: dict[str, Any] = {
        "stage": 3 if engine.kind == "zero3" else 1,
        "overlap_comm": engine.kind != "pipeline",  # DeepSpeed's pipeline reduces after the last backward pass
        # A copy that grouping saves; and a pipeline's gradients are complete where they are when they are reduced.
        "contiguous_gradients": engine.kind == "zero1"
        or (engine.kind == "zero3" and engine.communication == "deepspeed"),
        "reduce_scatter": True,
        "reduce_bucket_size": engine.reduce_bucket_size,
    }
    if engine.offload_optimizer:
        settings["offload_optimizer"] = {"device": "cpu"}
    if engine.kind == "zero3":
        layer, unembedding = layer_parameters(model), unembedding_parameters(model)
        head = max(head_parameters(model, index) for index in range(model.num_future_tokens))
        settings |= {
            # one layer ahead: head i + 1 arrives while head i computes
            "stage3_prefetch_bucket_size": max(layer, head),
            "stage3_max_live_parameters": layer
            + 2 * head
            + unembedding,  # a trunk layer, two heads and the unembedding
            # a layer used again in backward is gathered again: that is ZeRO-3's bargain
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": engine.param_persistence_threshold,
            # it replaces torch's linear by one that torch.compile compiles anew for each layer
            "memory_efficient_linear": False,
        }
        if engine.offload_parameters:
            settings["offload_param"] = {"device": "cpu"}
    return settings


def _check_with_deepspeed(settings: dict[str, Any]) -> None:
    """Raises: InputError for what DeepSpeed itself would end with a traceback."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    try:
        DeepSpeedConfig(settings)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(
            f"engine.deepspeed: {place}={first['input']!r}: {first['msg']}; see DeepSpeed's configuration"
        ) from None
    except Exception as error:  # of every kind: DeepSpeed does not check the types of what it is given
        reason = " ".join(str(error).split())
        raise InputError(
            f"engine.deepspeed is refused by DeepSpeed ({reason}); expected settings of the types it documents"
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
            raise InputError(f"{name} is {value!r}; expected a mapping of DeepSpeed's settings")
        elif key in ours:
            raise InputError(
                f"{name} clashes with megamtp's own setting ({ours[key]}); remove it: --help lists our keys"
            )
        else:
            merged[key] = value
    return merged
