"""Corrects DeepSpeed's gradients while heads run forward and backward passes inside the trunk's forward pass.

DeepSpeed assumes that a forward pass computes no gradients. Sequential heads (losses/sequential.py) break that
assumption: their backward passes run inside the forward pass. The outer backward pass, `loss.backward()`, then only
runs the trunk's backward pass. Without five corrections gradients are wrong, often silently. DeepSpeed would

    (a) scale the loss only for the outer backward pass. The heads' backward passes start from the same scaled gradient.
    (b) reduce a shared unembedding's gradient before every head has added to it. We mark it as ready only for the last
        head.
    (c) set whether the micro-batch is the last of its step at the outer backward pass, which is too late for the heads'
        reductions. zero.py sets it before the forward pass.
    (d) set the heads' bf16 gradients to zero at the outer backward pass. We add them to BF16_Optimizer's fp32 sums
        before that.
    (e) keep the heads' gradients that wait for their reduction if a step is interrupted, and add them to the next step.
        We discard them.

Tests: tests/distributed/test_head_hooks.py.
"""

import contextlib
from collections.abc import Iterator
from typing import cast

import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import nn

from megamtp.engines.deepspeed.grouped_communication import GroupedCommunication
from megamtp.engines.deepspeed.members import (
    DeepSpeedEngine,
    OffloadedModule,
    ParameterCoordinator,
    is_bf16,
    is_zero3,
    sharded,
    trained,
)
from megamtp.losses.sequential import HeadHooks
from megamtp.model.mtp import MTPModel

HEADS_PROFILER_RANGE = "megamtp heads"
# A module id that no module has. DeepSpeed does not release a parameter while its set of active modules contains an id.
PIN = -1


class ZeroHeadHooks(HeadHooks):
    """The HeadHooks under ZeRO-1 and ZeRO-3.

    Args:
        communication: None if DeepSpeed's own coordinator and buckets move weights and gradients.
    """

    def __init__(self, engine: DeepSpeedEngine, model: MTPModel, communication: GroupedCommunication | None):
        self.engine, self.model, self.communication = engine, model, communication

    def loss_gradient(self) -> float:
        return outer_loss_gradient(self.engine)

    @contextlib.contextmanager
    def all_heads(self) -> Iterator[None]:
        optimizer = self.engine.optimizer
        if is_bf16(optimizer):
            optimizer.clear_lp_grads()  # (d) as DeepSpeed does before a backward pass
        shared = filter(None, [self.model.unembedding])
        with self._pinned(*shared), torch.profiler.record_function(HEADS_PROFILER_RANGE):
            yield
        if is_bf16(optimizer):
            optimizer.update_hp_grads(clear_lp_grads=True)  # (d) before the outer backward pass sets them to zero

    @contextlib.contextmanager
    def one_head(self, local_index: int) -> Iterator[None]:
        index, shared = self.model.head_order[local_index], self.model.unembedding
        own = [self.model.head(index)] if shared else [self.model.head(index), self.model.unembedding_of(index)]
        shared_parameters = trained(shared.parameters()) if shared else []
        for parameter in shared_parameters:
            # (b) The gradient is complete after the last head. Until then it must not enter a reduction bucket.
            parameter.ds_grad_is_ready = local_index == len(self.model.head_order) - 1
        try:
            with self._pinned(*own):
                yield
        finally:
            for parameter in shared_parameters:
                parameter.ds_grad_is_ready = True

    @contextlib.contextmanager
    def _pinned(self, *modules: nn.Module) -> Iterator[None]:
        """Keeps the modules' weights gathered until the end of the block, so that they are gathered only once."""
        if self.communication:
            with contextlib.ExitStack() as pins:
                for module in modules:
                    pins.enter_context(self.communication.pinned(module))
                yield
            return
        optimizer = self.engine.optimizer
        if not is_zero3(optimizer):
            yield
            return
        parameters = [parameter for module in modules for parameter in sharded(module.parameters())]
        for parameter in parameters:
            parameter.ds_active_sub_modules.add(PIN)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.ds_active_sub_modules.discard(PIN)
            for module in modules:
                # forward=True, because no backward hook of DeepSpeed runs that could look up the module.
                optimizer.parameter_offload.get_param_coordinator().release_sub_module(module, forward=True)

    @contextlib.contextmanager
    def discard_gradients_on_error(self) -> Iterator[None]:
        """Encloses the micro-batches of a step. If it is interrupted, no gradients remain for the next step."""
        try:
            yield
        except BaseException:
            self._discard_gradients()
            raise

    def _discard_gradients(self) -> None:
        """(e) Discards gradients that wait in reduction buckets for an outer backward pass that will not run."""
        optimizer = self.engine.optimizer
        if self.communication:
            self.communication.reducer.end_step()  # also discards the gradients of partly finished modules
        for parameter in self.model.parameters():
            parameter.grad = None
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
        optimizer.zero_grad()  # also resets ZeRO-3's count of micro-batches and BF16_Optimizer's fp32 sums

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Encloses forward passes without backward passes, so that they do not disturb DeepSpeed's prefetching.

        DeepSpeed's coordinator records the order of fetches once, and discards the record when the order changes. An
        evaluation has another order than training, so it uses a second coordinator.
        """
        optimizer = self.engine.optimizer
        if not is_zero3(optimizer) or self.communication:  # WeightGatherer records both orders itself
            yield
            return
        offload = optimizer.parameter_offload
        training_coordinator = offload.param_coordinator
        evaluation_coordinator: ParameterCoordinator = PartitionedParameterCoordinator(
            prefetch_bucket_sz=offload._prefetch_bucket_sz,
            max_reuse_distance_in_numel=offload._max_reuse_distance_in_numel,
            max_available_parameters_in_numel=offload._max_available_parameters_in_numel,
            allgather_stream=offload._DeepSpeedZeRoOffload__allgather_stream,
            inflight_param_registry=cast("OffloadedModule", self.engine.module).ds_inflight_param_registry,
            prefetch_nvme=False,
        )
        offload.param_coordinator = evaluation_coordinator
        try:
            yield
        finally:
            evaluation_coordinator.reset_step()
            offload.param_coordinator = training_coordinator


class PipelineHeadHooks(HeadHooks):
    """The HeadHooks in a pipeline. It needs only (a), because gradients are reduced after the last pass of a step."""

    def __init__(self, engine: DeepSpeedEngine):
        self.engine = engine

    def loss_gradient(self) -> float:
        return outer_loss_gradient(self.engine)


def outer_loss_gradient(engine: DeepSpeedEngine) -> float:
    """Returns the gradient with which the outer backward pass will start: loss scale / gradient accumulation steps.

    This is correction (a).
    """
    with torch.enable_grad():
        # The clone has a grad_fn. DeepSpeed does not scale a leaf, because it does not regard it as a loss.
        loss = torch.ones((), requires_grad=True).clone()
    return engine.optimizer.scale_if_loss(loss).item() / engine.gradient_accumulation_steps()
