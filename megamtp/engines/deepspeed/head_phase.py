"""What DeepSpeed must be told while heads run forward and backward inside the trunk's forward pass.

DeepSpeed believes that a forward pass makes no gradients. Each step below corrects one such belief; leaving one out
gives wrong gradients, often silently. (a) to (e), of which (c) is in zero.py, are tested one by one.

Tests: tests/distributed/test_head_phase.py.
"""

import contextlib
from collections.abc import Iterator
from typing import cast

import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import nn

from megamtp.engines.deepspeed.members import (
    HostEngine,
    OffloadedModule,
    ParameterCoordinator,
    is_bf16,
    is_zero3,
    sharded,
    trained,
)
from megamtp.engines.deepspeed.traffic import GroupedTraffic
from megamtp.losses.sequential import HeadPhase
from megamtp.model.mtp import MTPModel

HEAD_PHASE_RANGE = "megamtp heads"  # how traces name the heads of a micro-batch
PIN = -1  # stands in a parameter's set of active modules, whose other members are module ids from 0 up


class DeepSpeedHeadPhase(HeadPhase):
    """Bookkeeping around the heads of one model under one DeepSpeed engine (ZeRO-1 or ZeRO-3).

    `traffic` is None where DeepSpeed's own coordinator and buckets do the work.
    """

    def __init__(self, engine: HostEngine, model: MTPModel, traffic: GroupedTraffic | None):
        self.engine, self.model, self.traffic = engine, model, traffic

    def loss_gradient(self) -> float:
        return backward_seed(self.engine)

    @contextlib.contextmanager
    def all_heads(self) -> Iterator[None]:
        optimizer = self.engine.optimizer
        if is_bf16(optimizer):
            optimizer.clear_lp_grads()  # (d) as its backward prologue would
        with self._pinned(self.model.unembedding), torch.profiler.record_function(HEAD_PHASE_RANGE):
            yield
        if is_bf16(optimizer):
            optimizer.update_hp_grads(clear_lp_grads=True)  # (d) into fp32 now: the outer prologue zeroes what it finds

    @contextlib.contextmanager
    def one_head(self, index: int) -> Iterator[None]:
        shared = trained(self.model.unembedding.parameters())
        for parameter in shared:
            # (b) Its gradient is complete at the last head only; until then it must not enter a reduction bucket.
            parameter.ds_grad_is_ready = index == len(self.model.heads) - 1
        try:
            with self._pinned(self.model.heads[index]):
                yield
        finally:
            for parameter in shared:
                parameter.ds_grad_is_ready = True

    @contextlib.contextmanager
    def _pinned(self, module: nn.Module) -> Iterator[None]:
        """Keeps a module's weights gathered from their first use until the end of the block: one gather for all
        uses.
        """
        if self.traffic:
            with self.traffic.pinned(module):
                yield
            return
        optimizer = self.engine.optimizer
        if not is_zero3(optimizer):
            yield
            return
        parameters = sharded(module.parameters())
        for parameter in parameters:
            parameter.ds_active_sub_modules.add(PIN)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.ds_active_sub_modules.discard(PIN)
            # forward=True: a release outside any backward hook, which would look for a module in backward.
            optimizer.parameter_offload.get_param_coordinator().release_sub_module(module, forward=True)

    @contextlib.contextmanager
    def whole_or_nothing(self) -> Iterator[None]:
        """Around the micro-batches of one step: if it is interrupted, no gradient of it reaches the next step."""
        try:
            yield
        except BaseException:
            self._forget_step()
            raise

    def _forget_step(self) -> None:
        optimizer = self.engine.optimizer
        if self.traffic:
            self.traffic.scatter.end()  # (e) here, gradients that wait for others of their module
        for parameter in self.model.parameters():
            parameter.grad = None
        # (e) The heads' gradients wait in reduction buckets for an outer backward that will not come.
        if is_zero3(optimizer):
            for sharded_bucket in optimizer.ipg_buckets.values():
                sharded_bucket.clear_params()
            optimizer.parameter_offload.param_coordinator.release_and_reset_all(self.model)
        elif not is_bf16(optimizer):
            for bucket in optimizer.ipg_buckets.values():
                bucket.clear()
            optimizer.extra_large_param_to_reduce.clear()
            optimizer.params_already_reduced = [False] * len(optimizer.params_already_reduced)
            optimizer.all_grad_tensors.clear()
            optimizer.averaged_gradients.clear()
            optimizer.grads_in_partition, optimizer.grads_in_partition_offset = None, 0
        optimizer.zero_grad()  # resets ZeRO-3's count of micro-batches and BF16_Optimizer's fp32 sums, too

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around forward passes without backward: they get a prefetch trace of their own.

        DeepSpeed's coordinator records the order of fetches once and drops the record when a pass strays from it. An
        evaluation would be such a pass, so it runs under a second coordinator.
        """
        optimizer = self.engine.optimizer
        if not is_zero3(optimizer) or self.traffic:  # Gather knows evaluation's order beside training's
            yield
            return
        offload = optimizer.parameter_offload
        training = offload.param_coordinator
        evaluation: ParameterCoordinator = PartitionedParameterCoordinator(
            prefetch_bucket_sz=offload._prefetch_bucket_sz,
            max_reuse_distance_in_numel=offload._max_reuse_distance_in_numel,
            max_available_parameters_in_numel=offload._max_available_parameters_in_numel,
            allgather_stream=offload._DeepSpeedZeRoOffload__allgather_stream,
            inflight_param_registry=cast("OffloadedModule", self.engine.module).ds_inflight_param_registry,
            prefetch_nvme=False,
        )
        offload.param_coordinator = evaluation
        try:
            yield
        finally:
            evaluation.reset_step()
            offload.param_coordinator = training


def backward_seed(engine: HostEngine) -> float:
    """(a) The outer backward will start with loss_scale / accumulation; the heads' own must too."""
    with torch.enable_grad():
        # a leaf, having no grad_fn, would not count as a loss: not be scaled
        one = torch.ones((), requires_grad=True).clone()
    return engine.optimizer.scale_if_loss(one).item() / engine.gradient_accumulation_steps()


class SeededHeads(HeadPhase):
    """Of a pipeline: heads' backward passes start as the last stage's will. No gradient is reduced before the last
    pass.
    """

    def __init__(self, engine: HostEngine):
        self.engine = engine

    def loss_gradient(self) -> float:
        return backward_seed(self.engine)
