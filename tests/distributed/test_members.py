"""The members of DeepSpeed's objects that engines/deepspeed/members.py names: they are there, and no other file
names more.
"""

import ast
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path

import pytest
from typing_extensions import get_protocol_members, is_protocol

from megamtp.engines.deepspeed import members
from tests.cases import global_batch, own_share, small_config
from tests.ranks import run_ranks

PACKAGE = Path(members.__file__).parents[2]
DOOR = Path(members.__file__).parent
PROTOCOLS = {name: value for name, value in vars(members).items() if is_protocol(value)}
ENGINES = {
    "zero3": {"engine__kind": "zero3", "engine__communication": "deepspeed"},
    "zero1, fp32": {"engine__kind": "zero1"},
    "zero1, bf16": {"engine__kind": "zero1", "train__precision": "bf16"},
    "pipeline": {"engine__kind": "pipeline", "engine__num_stages": 2, "train__precision": "bf16"},
}


def _is_of(value: object, hint: typing.Any) -> bool:
    """Whether a value is of a type, in which elements do not count; a Protocol has its members looked for elsewhere."""
    if isinstance(hint, types.UnionType):
        return any(_is_of(value, kind) for kind in typing.get_args(hint))
    kind = typing.get_origin(hint) or hint
    return is_protocol(kind) or isinstance(value, (int, float) if kind is float else kind)


def _found(protocol: type, instance: object) -> set[tuple[str, str]]:
    """Those of a Protocol's members that an object has."""
    hints = typing.get_type_hints(protocol)
    return {
        (protocol.__name__, name)
        for name in get_protocol_members(protocol)
        if hasattr(instance, name) and _is_of(getattr(instance, name), hints.get(name, Callable))
    }


def _objects(engine) -> list[tuple[type, object]]:
    """(Protocol, an object that it describes) of an engine of ours after a step."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    host, optimizer = engine.deepspeed_engine, engine.deepspeed_engine.optimizer
    found = [
        (members.DeepSpeedEngine, host),
        *((members.TrainedParameter, parameter) for parameter in engine.model.parameters()),
    ]
    if members.is_zero3(optimizer):
        offload = optimizer.parameter_offload
        coordinator = [members.ReplaceableCoordinator, members.ParameterCoordinator]
        found += [(protocol, offload.get_param_coordinator()) for protocol in coordinator]
        found += [
            (members.Zero3Optimizer, optimizer),
            (members.Zero3Offload, offload),
            (members.OffloadedModule, host.module),
        ]
        found += [(members.Zero3Bucket, bucket) for bucket in optimizer.ipg_buckets.values()]
        return found + [(members.ShardedParameter, parameter) for parameter in engine.model.parameters()]
    found += [(members.UnshardedParameter, parameter) for parameter in engine.model.parameters()]
    for mapping in (parameter._hp_mapping for parameter in engine.model.parameters() if parameter._hp_mapping):
        addresses = (mapping.lp_fragment_address, mapping.hp_fragment_address)
        found += [(members.FragmentMapping, mapping), *((members.FragmentAddress, address) for address in addresses)]
    if members.is_bf16(optimizer):
        found += [(members.Bf16Optimizer, optimizer), (members.CommonOptimizer, optimizer)]
    else:
        scaler = DynamicLossScaler(2.0**16, 3, min_scale=1.0, delayed_shift=2, consecutive_hysteresis=False)
        found += [(members.Zero1Optimizer, optimizer), (members.LossScaler, scaler)]
        found += [(members.Zero1Bucket, bucket) for bucket in optimizer.ipg_buckets.values()]
    if engine.config.engine.kind == "pipeline":
        found += [
            (members.DeepSpeedPipelineEngine, host),
            (members.StageModule, host.module),
            (members.StageGrid, host.module._grid),
        ]
    return found


def _members_of_all_engines() -> set[tuple[str, str]]:
    """(Protocol, member) that any of the engines' objects has."""
    from megamtp.engines.base import count_targets
    from megamtp.engines.build import build_engine

    found = set()
    for settings in ENGINES.values():
        config = small_config(1 if settings["engine__kind"] == "pipeline" else 2, accumulation=2, **settings)
        engine = build_engine(config)
        own = own_share(
            global_batch(config, 0, 2 * engine.data_parallel_size), engine.data_parallel_rank, engine.data_parallel_size
        )
        engine.train_batch(own, count_targets(own, True, engine.data_parallel_size, engine.device), lr=1e-3)
        for protocol, instance in _objects(engine):
            found |= _found(protocol, instance)
    return found


def test_every_member_is_on_an_engines_objects():
    named = {(name, member) for name, protocol in PROTOCOLS.items() for member in get_protocol_members(protocol)}
    assert len(named) > 100
    assert sorted(named - set.union(*run_ranks(_members_of_all_engines, 2))) == []


@pytest.mark.parametrize(
    ("member", "reader"),
    [
        ("ds_grad_is_ready", "deepspeed.runtime.zero.stage3"),
        ("ds_grad_is_ready", "deepspeed.runtime.zero.stage_1_and_2"),
        ("ds_pipe_replicated", "deepspeed.runtime.utils"),
        ("ds_pipe_replicated", "deepspeed.runtime.bf16_optimizer"),
        ("_running_engine_backward", "deepspeed.runtime.engine"),
        ("_train_schedule", "deepspeed.runtime.pipe.engine"),
        ("_inference_schedule", "deepspeed.runtime.pipe.engine"),
        ("_update_hp_grad", "deepspeed.runtime.bf16_optimizer"),
        ("independent_gradient_partition_epilogue", "deepspeed.runtime.zero.stage3"),
    ],
)
def test_deepspeed_reads_what_is_set_here(member, reader):
    assert re.search(rf"\.{member}\b|\"{member}\"", inspect.getsource(importlib.import_module(reader)))


def test_members_are_named_behind_the_door_only():
    outside = [path for path in PACKAGE.rglob("*.py") if DOOR not in path.parents]
    assert len(outside) > 50
    assert [str(path) for path in outside if re.search(r"\.ds_[a-z]", path.read_text())] == []


def test_private_members_that_are_used_are_named():
    """Of objects other than the own one: DeepSpeed's, by their underscore or ds_."""
    named = {member for protocol in PROTOCOLS.values() for member in get_protocol_members(protocol)}
    used = {
        node.attr
        for path in DOOR.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and re.match(r"ds_|_[^_]", node.attr)
        if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "torch"))
    }
    assert len(used) > 15
    assert sorted(used - named) == []
