"""Finds a rank's fp32 master weights and optimizer state, by parameter name, in any DeepSpeed optimizer.

Each DeepSpeed optimizer concatenates pieces of the parameters into flat fp32 tensors: ZeRO-3 has one tensor per
sub-group, the others have one per parameter group. This module finds the parameter's name for every piece, so that a
checkpoint does not depend on the optimizer that wrote it. Checked against DeepSpeed 0.19.

Source: deepspeed/runtime/zero/stage3.py, stage_1_and_2.py; deepspeed/runtime/bf16_optimizer.py;
deepspeed/utils/tensor_fragment.py.

Tests: tests/distributed/test_checkpoints.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamtp.checkpoint.contents import WEIGHT
from megamtp.checkpoint.state import OptimizerState
from megamtp.engines.deepspeed.members import DeepSpeedEngine, Zero3Optimizer, is_bf16, is_zero3, sharded, unsharded
from megamtp.optimizers.base import OptimizerKind


@dataclass(frozen=True)
class Fragment:
    """A range of one parameter's elements on this rank: start, start + 1, ... of the flattened parameter.

    Attributes:
        tensors: fp32 views [length] of the weights and the optimizer's tensors, by kind (checkpoint/shards.py), on the
            GPU or CPU where the optimizer keeps them. Training changes them.
        is_copy: another rank has the same elements and saves them.
    """

    name: str
    start: int
    tensors: dict[str, Tensor]
    is_copy: bool


class MasterState:
    """The fp32 master weights and optimizer state of a DeepSpeed engine on this rank.

    Creates optimizer state that does not exist before the first step.
    """

    def __init__(self, engine: DeepSpeedEngine, kind: type[OptimizerKind]):
        self._optimizer, self._kind = engine.optimizer, kind
        self._states = {flat: self._optimizer.optimizer.state[flat] for flat in self._flat_weights()}
        for flat, state in self._states.items():
            kind.prepare(state, flat)
        model, optimizer = engine.module, self._optimizer
        self.fragments = list(
            self._zero3_fragments(model, optimizer) if is_zero3(optimizer) else self._zero1_fragments(model)
        )

    @property
    def steps(self) -> tuple[int, ...]:
        """The optimizer's step counts, in the format of OptimizerState."""
        by_group = dict(zip(self._parameter_groups(), self._states.values(), strict=True))
        steps = tuple(int(by_group[group]["step"]) for group in sorted(by_group))
        return steps[:1] if len(set(steps)) == 1 else steps

    def set_steps(self, saved: OptimizerState) -> None:
        """Sets the optimizer's step counts.

        Raises:
            IndexError: the optimizer has more parameter groups than `saved`.
        """
        for group, state in zip(self._parameter_groups(), self._states.values(), strict=True):
            state["step"].fill_(saved.steps_of(group))

    def _parameter_groups(self) -> list[int]:
        """Returns the parameter group of each flat tensor."""
        indices = range(len(self._states))
        if is_zero3(self._optimizer):
            return [self._optimizer.sub_group_to_group_id[index] for index in indices]
        return list(indices)

    @torch.no_grad()
    def update_model_weights(self) -> None:
        """Copies the master weights to the model's weights, in their dtype. Collective."""
        if not is_zero3(self._optimizer):
            self._optimizer.update_lp_params()
            return
        self._optimizer.checkpoint_event_prologue()
        for sub_group in range(len(self._optimizer.fp16_groups)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        self._optimizer.checkpoint_event_epilogue()

    def _flat_weights(self) -> list[Tensor]:
        if is_zero3(self._optimizer):
            return self._optimizer.fp32_partitioned_groups_flat
        if is_bf16(self._optimizer):
            return self._optimizer.fp32_groups_flat_partition
        return self._optimizer.single_partition_of_fp32_groups

    def _zero3_fragments(self, model: nn.Module, optimizer: Zero3Optimizer) -> Iterator[Fragment]:
        parameters, flat_weights = dict(model.named_parameters()), self._flat_weights()
        for name, parameter in zip(parameters, sharded(parameters.values()), strict=True):
            sub_group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = dist.get_rank(parameter.ds_process_group) * size
            size = min(size, parameter.ds_numel - start)  # the last ranks' shards are padded
            if size > 0:
                yield Fragment(name, start, self._views(flat_weights[sub_group], offset, size), is_copy=False)

    def _zero1_fragments(self, model: nn.Module) -> Iterator[Fragment]:
        # also for BF16_Optimizer, which shards like ZeRO-1
        parameters, flat_weights = dict(model.named_parameters()), self._flat_weights()
        for name, parameter in zip(parameters, unsharded(parameters.values()), strict=True):
            mapping = parameter._hp_mapping
            if mapping:  # None if this rank has no element of the parameter
                address, flat = mapping.hp_fragment_address, flat_weights[mapping.param_group_index]
                views = self._views(flat, address.start, address.numel)
                is_copy = getattr(parameter, "ds_pipe_replicated", False)
                start = getattr(parameter, "first_element", 0) + mapping.lp_fragment_address.start
                yield Fragment(name, start, views, is_copy)

    def _views(self, flat: Tensor, offset: int, size: int) -> dict[str, Tensor]:
        state = self._states[flat]
        tensors = {WEIGHT: flat.detach(), **{name: state[name] for name in self._kind.tensors}}
        return {kind: tensor[offset : offset + size] for kind, tensor in tensors.items()}
