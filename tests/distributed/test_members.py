"""The members of DeepSpeed's objects in engines/deepspeed/members.py: all of them exist, and no others are used."""

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
DEEPSPEED_PACKAGE = Path(members.__file__).parent
PROTOCOLS = {name: value for name, value in vars(members).items() if is_protocol(value)}
ENGINES = {
    "zero3": {"engine__kind": "zero3", "engine__communication": "deepspeed"},
    "zero1, fp32": {"engine__kind": "zero1"},
    "zero1, bf16": {"engine__kind": "zero1", "train__precision": "bf16"},
    "pipeline": {"engine__kind": "pipeline", "engine__num_stages": 2, "train__precision": "bf16"},
}


def _has_type(value: object, hint: typing.Any) -> bool:
    """Returns whether a value has a type. Elements are not checked, and members of Protocols are checked elsewhere."""
    if isinstance(hint, types.UnionType):
        return any(_has_type(value, kind) for kind in typing.get_args(hint))
    kind = typing.get_origin(hint) or hint
    return is_protocol(kind) or isinstance(value, (int, float) if kind is float else kind)


def _existing_members(protocol: type, instance: object) -> set[tuple[str, str]]:
    """Returns (Protocol, member) for the Protocol's members that an object has, with their types."""
    hints = typing.get_type_hints(protocol)
    return {
        (protocol.__name__, name)
        for name in get_protocol_members(protocol)
        if hasattr(instance, name) and _has_type(getattr(instance, name), hints.get(name, Callable))
    }


def _objects(engine) -> list[tuple[type, object]]:
    """Returns (Protocol, object that it describes) for an engine of megamtp after a step."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    deepspeed_engine, optimizer = engine.deepspeed_engine, engine.deepspeed_engine.optimizer
    objects = [
        (members.DeepSpeedEngine, deepspeed_engine),
        *((members.TrainedParameter, parameter) for parameter in engine.model.parameters()),
    ]
    if members.is_zero3(optimizer):
        offload = optimizer.parameter_offload
        coordinators = [members.ReplaceableCoordinator, members.ParameterCoordinator]
        objects += [(protocol, offload.get_param_coordinator()) for protocol in coordinators]
        objects += [
            (members.Zero3Optimizer, optimizer),
            (members.Zero3Offload, offload),
            (members.OffloadedModule, deepspeed_engine.module),
        ]
        objects += [(members.Zero3Bucket, bucket) for bucket in optimizer.ipg_buckets.values()]
        return objects + [(members.ShardedParameter, parameter) for parameter in engine.model.parameters()]
    objects += [(members.UnshardedParameter, parameter) for parameter in engine.model.parameters()]
    for mapping in (parameter._hp_mapping for parameter in engine.model.parameters() if parameter._hp_mapping):
        addresses = (mapping.lp_fragment_address, mapping.hp_fragment_address)
        objects += [(members.FragmentMapping, mapping), *((members.FragmentAddress, address) for address in addresses)]
    if members.is_bf16(optimizer):
        objects += [(members.Bf16Optimizer, optimizer), (members.CommonOptimizer, optimizer)]
    else:
        scaler = DynamicLossScaler(2.0**16, 3, min_scale=1.0, delayed_shift=2, consecutive_hysteresis=False)
        objects += [(members.Zero1Optimizer, optimizer), (members.LossScaler, scaler)]
        objects += [(members.Zero1Bucket, bucket) for bucket in optimizer.ipg_buckets.values()]
    if engine.config.engine.kind == "pipeline":
        objects += [
            (members.DeepSpeedPipelineEngine, deepspeed_engine),
            (members.StageModule, deepspeed_engine.module),
            (members.StageGrid, deepspeed_engine.module._grid),
        ]
    return objects


def _members_of_all_engines() -> set[tuple[str, str]]:
    """Returns (Protocol, member) for all members that an object of any engine has."""
    from megamtp.engines.base import count_targets
    from megamtp.engines.build import build_engine

    existing = set()
    for settings in ENGINES.values():
        config = small_config(1 if settings["engine__kind"] == "pipeline" else 2, accumulation=2, **settings)
        engine = build_engine(config)
        own = own_share(
            global_batch(config, 0, 2 * engine.data_parallel_size), engine.data_parallel_rank, engine.data_parallel_size
        )
        engine.train_batch(own, count_targets(own, True, engine.data_parallel_size, engine.device), lr=1e-3)
        for protocol, instance in _objects(engine):
            existing |= _existing_members(protocol, instance)
    return existing


def test_every_member_exists_on_an_object_of_an_engine():
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
def test_deepspeed_reads_the_members_that_megamtp_sets(member, reader):
    assert re.search(rf"\.{member}\b|\"{member}\"", inspect.getsource(importlib.import_module(reader)))


def test_only_the_deepspeed_package_uses_ds_members():
    outside = [path for path in PACKAGE.rglob("*.py") if DEEPSPEED_PACKAGE not in path.parents]
    assert len(outside) > 50
    assert [str(path) for path in outside if re.search(r"\.ds_[a-z]", path.read_text())] == []


def test_all_private_members_in_use_are_listed():
    """These are attributes of objects other than self that begin with an underscore or ds_."""
    named = {member for protocol in PROTOCOLS.values() for member in get_protocol_members(protocol)}
    used = {
        node.attr
        for path in DEEPSPEED_PACKAGE.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and re.match(r"ds_|_[^_]", node.attr)
        if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "torch"))
    }
    assert len(used) > 15
    assert sorted(used - named) == []
