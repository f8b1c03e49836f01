"""ZeRO-1 and ZeRO-3 through DeepSpeed, with sequential heads.

Source: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megamtp.cluster.environment import raised_by_all
from megamtp.config import Config
from megamtp.data.loader import Batch
from megamtp.engines.base import DTYPES, StepResult, layer_options, loss_scales, move_to_device
from megamtp.engines.deepspeed import host
from megamtp.engines.deepspeed.grouped_communication import GroupedCommunication
from megamtp.engines.deepspeed.head_hooks import ZeroHeadHooks
from megamtp.engines.deepspeed.members import full_shape
from megamtp.engines.deepspeed.settings import deepspeed_config
from megamtp.engines.hosted import HostedEngine
from megamtp.engines.initial_weights import initial_weights
from megamtp.model.initial import STANDARD_DEVIATION
from megamtp.model.layers import TransformerLayer
from megamtp.model.mtp import MTPModel
from megamtp.model.unembedding import Unembedding
from megamtp.targets import IGNORED


class ZeroEngine(HostedEngine):
    """The Engine for engine.kind zero1 and zero3. torch.distributed must be initialised.

    Attributes:
        communication: replaces DeepSpeed's gathers and reductions under engine.communication=grouped; else None.
    """

    model: MTPModel

    def __init__(self, config: Config):
        super().__init__(config, (dist.get_rank(), dist.get_world_size()))
        self.attach_model(_build_model(config, deepspeed_config(config, self.data_parallel_size), self.device))
        self.communication = None
        if config.engine.kind == "zero3" and config.engine.communication == "grouped":
            modules = [self.model.embedding, *self.model.trunk, *self.model.heads]
            modules += [module for module in self.model.modules() if isinstance(module, Unembedding)]
            self.communication = GroupedCommunication(self.deepspeed_engine, modules, config.engine.prefetch_modules)
        self.head_hooks = ZeroHeadHooks(self.deepspeed_engine, self.model, self.communication)
        self.model.head_hooks = self.head_hooks

    def train_batch(self, micro_batches: list[Batch], target_counts: list[int], lr: float) -> StepResult:
        """See Engine.train_batch."""
        engine = self.deepspeed_engine
        engine.train()
        self._quantise_weights()
        # If the reduction averages gradients over the ranks, loss_scales must undo that.
        averages = self.communication is None or self.communication.reducer.averages
        num_averaged_ranks = self.world_size if averages else 1
        scales = loss_scales(self.config.head_weights, target_counts, num_averaged_ranks, len(micro_batches))
        host.set_learning_rate(engine, lr)
        nll_sums = torch.zeros(self.config.model.num_future_tokens, device=self.device)
        with self.head_hooks.discard_gradients_on_error():
            for index, batch in enumerate(move_to_device(micro_batches, self.device)):
                # Correction (c) of head_hooks.py: DeepSpeed itself sets this at the start of the outer backward pass,
                # which is too late for the heads' reductions.
                engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
                loss, micro_batch_nll_sums = engine(*_inputs(batch, scales))
                engine.backward(loss)
                engine.step()
                nll_sums += micro_batch_nll_sums
        result = self.step_result(nll_sums)
        if result.skipped and self.config.engine.kind == "zero1" and self.config.engine.offload_optimizer:
            host.discard_skipped_gradients(engine)
        return result

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Tensor:
        """See Engine.evaluate."""
        self.deepspeed_engine.eval()
        self._quantise_weights()
        scales = [1.0] * self.config.model.num_future_tokens
        totals = torch.zeros(2, len(scales), dtype=torch.float64, device=self.device)
        with self.head_hooks.evaluating():
            for batch in (batch.to(self.device) for batch in batches):
                _, nll_sums = self.deepspeed_engine(*_inputs(batch, scales))
                totals += torch.stack((nll_sums, (batch.targets != IGNORED).sum(dim=(1, 2))))
        return totals.flatten()

    def _quantise_weights(self) -> None:
        if self.config.engine.kind == "zero1":  # grouped communication quantises the shards of zero3
            self.model.quantise_weights()


def _inputs(batch: Batch, scales: list[float]) -> tuple[Any, ...]:
    """Returns the arguments of MTPModel.forward."""
    return batch.inputs, batch.targets, scales, batch.documents, batch.following


def _build_model(config: Config, settings: dict, device: torch.device) -> MTPModel:
    """Builds the model with its initial weights. Under ZeRO-3 no rank ever holds more than one full parameter."""
    sharded = config.engine.kind == "zero3"
    with host.sharded_construction(settings) if sharded else torch.device("meta"):
        model = MTPModel(
            config.model, config.resolved_head_loss, config.engine.head_schedule, layer_options(config.train, device)
        )
    if sharded:
        host.gather_as_one_module(model, {TransformerLayer, *map(type, model.heads)})
    else:
        model = model.to(DTYPES[config.train.dtype]).to_empty(device=device)
    if config.cluster.emulate and sharded:
        host.fill_shards(model, STANDARD_DEVIATION)
    elif sharded:
        _initialise_shards(model, config)
    else:
        with raised_by_all():
            _initialise(model, config)
    return model


@torch.no_grad()
def _initialise(model: MTPModel, config: Config) -> None:
    """Sets every parameter to its initial value."""
    initial = initial_weights(config)
    for name, parameter in model.named_parameters():
        parameter.copy_(initial(name, tuple(parameter.shape)))


def _initialise_shards(model: MTPModel, config: Config) -> None:
    """Sets every sharded parameter to its initial value. Collective.

    Rank r draws or reads the parameters r, r + world_size, ...; all ranks do so at the same time.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with raised_by_all():
        initial = initial_weights(config)
    parameters = list(model.named_parameters())
    for first in range(0, len(parameters), world_size):
        group = parameters[first : first + world_size]
        value = None
        with raised_by_all():
            if rank < len(group):
                name, parameter = group[rank]
                value = initial(name, full_shape(parameter))
        for owner, (_, parameter) in enumerate(group):
            with host.gathered_for_update([parameter], owner), torch.no_grad():
                if owner == rank and value is not None:
                    parameter.copy_(value)
