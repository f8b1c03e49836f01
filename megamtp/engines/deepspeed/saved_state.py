"""Saves and loads the state of any DeepSpeed engine, at any number of ranks.

Tests: tests/distributed/test_checkpoints.py, tests/distributed/test_saving.py.
"""

from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamtp.checkpoint.contents import WEIGHT, check_tensors
from megamtp.checkpoint.shards import ShardedTensors, Shards, shard_name, slice_key
from megamtp.checkpoint.state import COUNTERS, OptimizerState, RunState, read_state
from megamtp.checkpoint.store import Manifest, read_manifest
from megamtp.cluster.environment import raised_by_all
from megamtp.config import Config, OptimizerConfig
from megamtp.engines.base import EngineState
from megamtp.engines.deepspeed.fragments import MasterState
from megamtp.engines.deepspeed.members import DeepSpeedEngine, full_shape
from megamtp.errors import CheckpointError
from megamtp.optimizers.kinds import optimizer_kind

LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # attributes of fp16's loss scaler
RANDOM = "random"  # prefix of the random number states in a rank's shard: random/cpu, random/cuda


def engine_state(engine: DeepSpeedEngine, optimizer: OptimizerConfig) -> EngineState:
    """Returns the state of an engine. See Engine.state."""
    kind = optimizer_kind(optimizer)
    master, scaler = MasterState(engine, kind), getattr(engine.optimizer, "loss_scaler", None)
    tensors = {
        slice_key(tensor_kind, fragment.name, fragment.start): fragment.tensors[tensor_kind]
        for tensor_kind in (WEIGHT, *kind.tensors)
        for fragment in master.fragments
        if not fragment.is_copy
    }
    run = RunState(
        OptimizerState(optimizer.kind, kind.tensors, master.steps),
        {name: getattr(engine, name) for name in COUNTERS},
        {name: getattr(scaler, name) for name in LOSS_SCALE} if isinstance(scaler, DynamicLossScaler) else None,
    )
    shapes = {name: full_shape(parameter) for name, parameter in engine.module.named_parameters()}
    return EngineState(tensors | _random_states(), shapes, run)


def load_state(engine: DeepSpeedEngine, checkpoint: Path, config: Config, rank: int, world_size: int) -> None:
    """Restores the state of an engine. See Engine.load."""
    with raised_by_all():
        master = _load_rank_state(engine, checkpoint, config, rank, world_size)
    master.update_model_weights()


def _load_rank_state(
    engine: DeepSpeedEngine, checkpoint: Path, config: Config, rank: int, world_size: int
) -> MasterState:
    """Restores this rank's master weights, optimizer state, counters and random number states. Not collective."""
    manifest, kind = read_manifest(checkpoint, check_files=False), optimizer_kind(config.optimizer)
    state = read_state(manifest.state, checkpoint)
    if state.optimizer.kind != config.optimizer.kind:
        raise CheckpointError(
            f"{checkpoint} was trained with optimizer.kind={state.optimizer.kind}, not {config.optimizer.kind}; change "
            "it back, or start a new run from its weights: convert_checkpoint --to canonical, then run.initial_weights"
        )
    master = MasterState(engine, kind)
    expected = {name: full_shape(parameter) for name, parameter in engine.module.named_parameters()}
    same_layout = (manifest.engine_kind, manifest.world_size) == (config.engine.kind, world_size)
    tensor_kinds = (WEIGHT, *kind.tensors)
    saved = _open_own_shard(checkpoint, master, rank, tensor_kinds) if same_layout else None
    if not saved:
        shards = Shards(checkpoint, manifest.files)
        saved = {tensor_kind: shards.tensors(tensor_kind) for tensor_kind in tensor_kinds}
    shapes = saved[WEIGHT].shapes
    check_tensors({name: shapes[name] for name in expected if name in shapes}, expected, checkpoint)
    for fragment in master.fragments:
        for tensor_kind, tensor in fragment.tensors.items():
            tensor.copy_(saved[tensor_kind].read(fragment.name, fragment.start, fragment.start + len(tensor)))
    master.set_steps(state.optimizer)
    for name, count in state.counters.items():
        setattr(engine, name, count)
    _set_loss_scale(engine, state.loss_scale)
    _set_random_states(checkpoint / shard_name(rank) if same_layout else None, manifest, rank)
    return master


def _open_own_shard(
    checkpoint: Path, master: MasterState, rank: int, tensor_kinds: tuple[str, ...]
) -> dict[str, ShardedTensors] | None:
    """Returns the tensors in this rank's shard file, by kind, or None if it also needs other files.

    A job with the same partition as the previous job needs no other file.
    """
    shard = Shards(checkpoint, [shard_name(rank)])
    tensors = {kind: shard.available_tensors(kind) for kind in tensor_kinds}
    needed = [
        (kind, fragment.name, fragment.start, fragment.start + len(tensor))
        for fragment in master.fragments
        for kind, tensor in fragment.tensors.items()
    ]
    return tensors if all(tensors[kind].has(name, start, end) for kind, name, start, end in needed) else None


def _set_loss_scale(engine: DeepSpeedEngine, saved: dict[str, Any] | None) -> None:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if saved and isinstance(scaler, DynamicLossScaler):
        for name in LOSS_SCALE:
            setattr(scaler, name, saved[name])


def _random_states() -> dict[str, Tensor]:
    states = {f"{RANDOM}/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"{RANDOM}/cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(shard: Path | None, manifest: Manifest, rank: int) -> None:
    """Restores the random number states in `shard`. Without them, seeds them by step and rank."""
    torch.manual_seed((manifest.step << 24) + rank)
    if not shard or not shard.exists():
        return
    try:
        with safe_open(shard, framework="pt") as opened:
            keys = set(opened.keys())
            if f"{RANDOM}/cpu" in keys:
                torch.set_rng_state(opened.get_tensor(f"{RANDOM}/cpu"))
            if f"{RANDOM}/cuda" in keys and torch.cuda.is_available():
                torch.cuda.set_rng_state(opened.get_tensor(f"{RANDOM}/cuda"))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{shard} is damaged ({error}); remove {shard.parent} to resume from an older checkpoint"
        ) from None
