"""This rank's part of the fp32 weights and of the optimizer's state, under any of DeepSpeed's optimizers.

Each of them keeps flat fp32 tensors in which parts of the parameters follow each other: ZeRO-3 one for each sub-group,
the others one for each parameter group. Here the parts get their parameters' names, so that no checkpoint need know
which optimizer wrote it. Checked against DeepSpeed 0.19. Source: deepspeed/runtime/zero/stage3.py, stage_1_and_2.py;
deepspeed/runtime/bf16_optimizer.py; deepspeed/utils/tensor_fragment.py.

Tests: tests/distributed/test_checkpoints.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamtp.checkpoint.contents import WEIGHT
from megamtp.checkpoint.state import OptimizerState
from megamtp.engines.deepspeed.members import HostEngine, Zero3Optimizer, is_bf16, is_zero3, sharded, unsharded
from megamtp.optimizers.base import OptimizerKind


@dataclass(frozen=True)
class Fragment:
    """Elements start, start + 1, ... of one parameter's row-major numbers, as they are in memory on this rank's device
    or CPU.

    Attributes:
        tensors: views [length], fp32, of the weights and the optimizer's tensors, by kind (checkpoint/shards.py);
            training changes them.
        is_copy: another rank has the same elements, and writes them.
    """

    name: str
    start: int
    tensors: dict[str, Tensor]
    is_copy: bool


class MasterState:
    """The fp32 weights and the optimizer's state of one DeepSpeed engine, on this rank."""

    def __init__(self, engine: HostEngine, kind: type[OptimizerKind]):
        """State that the first step has not made yet is made here."""
        self._optimizer, self._kind = engine.optimizer, kind
        self._states = {flat: self._optimizer.optimizer.state[flat] for flat in self._flat_weights()}
        for flat, state in self._states.items():
            kind.prepare(state, flat)
        model, optimizer = engine.module, self._optimizer
        self.fragments = list(self._of_zero3(model, optimizer) if is_zero3(optimizer) else self._of_zero1(model))

    @property
    def steps(self) -> tuple[int, ...]:
        """The optimizer's own count, as OptimizerState has it."""
        by_group = dict(zip(self._groups(), self._states.values(), strict=True))
        steps = tuple(int(by_group[group]["step"]) for group in sorted(by_group))
        return steps[:1] if len(set(steps)) == 1 else steps

    def set_steps(self, saved: OptimizerState) -> None:
        """Raises IndexError: there are more groups than in `saved`."""
        for group, state in zip(self._groups(), self._states.values(), strict=True):
            state["step"].fill_(saved.steps_of(group))

    def _groups(self) -> list[int]:
        """The parameter group of each flat tensor of weights."""
        indices = range(len(self._states))
        if is_zero3(self._optimizer):
            return [self._optimizer.sub_group_to_group_id[index] for index in indices]
        return list(indices)

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Copies the fp32 weights into the engine's weights, in their dtype. Collective."""
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

    def _of_zero3(self, model: nn.Module, optimizer: Zero3Optimizer) -> Iterator[Fragment]:
        parameters, flat_weights = dict(model.named_parameters()), self._flat_weights()
        for name, parameter in zip(parameters, sharded(parameters.values()), strict=True):
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = dist.get_rank(parameter.ds_process_group) * size
            size = min(size, parameter.ds_numel - start)  # the last rank's part is padded
            if size > 0:
                yield Fragment(name, start, self._views(flat_weights[group], offset, size), is_copy=False)

    def _of_zero1(self, model: nn.Module) -> Iterator[Fragment]:
        parameters, flat_weights = dict(model.named_parameters()), self._flat_weights()
        for name, parameter in zip(parameters, unsharded(parameters.values()), strict=True):
            mapping = parameter._hp_mapping
            if mapping:  # else the whole parameter is on other ranks
                place, flat = mapping.hp_fragment_address, flat_weights[mapping.param_group_index]
                views = self._views(flat, place.start, place.numel)
                is_copy = getattr(parameter, "ds_pipe_replicated", False)
                start = getattr(parameter, "first_element", 0) + mapping.lp_fragment_address.start
                yield Fragment(name, start, views, is_copy)

    def _views(self, flat: Tensor, offset: int, size: int) -> dict[str, Tensor]:
        state = self._states[flat]
        whole = {WEIGHT: flat.detach(), **{name: state[name] for name in self._kind.tensors}}
        return {kind: tensor[offset : offset + size] for kind, tensor in whole.items()}
