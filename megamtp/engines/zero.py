"""ZeRO-1 and ZeRO-3 through DeepSpeed, with sequential heads.

Source: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

import contextlib
from collections.abc import Iterable
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor

from megamtp.config import Config
from megamtp.data.loader import Batch
from megamtp.engines.base import DTYPES, EngineState, StepResult, loss_scales, on_device
from megamtp.engines.deepspeed_config import deepspeed_config
from megamtp.engines.head_phase import DeepSpeedHeadPhase, full_shape
from megamtp.engines.initial_weights import initial_weights
from megamtp.engines.optimizer import adamw
from megamtp.engines.saved_state import engine_state, load_state
from megamtp.engines.traffic import GroupedTraffic, fill_shards
from megamtp.losses.softmax_gradient import IGNORED
from megamtp.model.initial import STANDARD_DEVIATION
from megamtp.model.layers import TransformerLayer
from megamtp.model.mtp import MTPModel


class ZeroEngine:
    """The Engine of engine.kind zero1 and zero3. torch.distributed must be initialised.

    Attributes:
        engine: DeepSpeed's own.
        model: the MTPModel inside it.
        traffic: what stands in for DeepSpeed's gathers and reductions; None where they are DeepSpeed's own.
    """

    def __init__(self, config: Config):
        self.config = config
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.data_parallel_rank, self.data_parallel_size = self.rank, self.world_size
        self.device = torch.device(get_accelerator().current_device_name())
        settings = deepspeed_config(config, self.data_parallel_size)
        self.model = _build_model(config, settings, self.device)
        self.engine, *_ = deepspeed.initialize(
            model=self.model, optimizer=adamw(config, self.model), config=settings, dist_init_required=False
        )
        self.traffic = None
        if config.engine.kind == "zero3" and config.engine.communication == "grouped":
            modules = [self.model.embedding, *self.model.trunk, *self.model.heads, self.model.unembedding]
            self.traffic = GroupedTraffic(self.engine, modules, config.engine.prefetch_modules)
        self.head_phase = self.model.head_phase = DeepSpeedHeadPhase(self.engine, self.model, self.traffic)

    def train_batch(self, micro_batches: list[Batch], target_counts: list[int], lr: float) -> StepResult:
        """See Engine.train_batch."""
        self.engine.train()
        # Where the reduction does not divide by the number of ranks, the loss is not multiplied by it.
        averaged_ranks = self.world_size if self.traffic is None or self.traffic.scatter.divides else 1
        scales = loss_scales(self.config.head_weights, target_counts, averaged_ranks, len(micro_batches))
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        nll_sums = torch.zeros(self.config.model.num_future_tokens, device=self.device)
        with self.head_phase.whole_or_nothing():
            for index, batch in enumerate(on_device(micro_batches, self.device)):
                # (c) DeepSpeed tells its optimizer only when the outer backward starts; the heads' reductions come before it.
                self.engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
                loss, micro_nll_sums = self.engine(batch.inputs, batch.targets, scales, batch.documents)
                self.engine.backward(loss)
                self.engine.step()
                nll_sums += micro_nll_sums
        skipped = self.engine.was_step_applied() is False
        if skipped and self.config.engine.kind == "zero1" and self.config.engine.offload_optimizer:
            # DeepSpeed keeps a skipped step's gradients here, and would add the next step's to them (stage_1_and_2.py, step).
            for group in self.engine.optimizer.averaged_gradients:
                self.engine.optimizer.averaged_gradients[group] = None
        return StepResult(nll_sums, float(self.engine.get_global_grad_norm()), skipped)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Tensor:
        """See Engine.evaluate."""
        self.engine.eval()
        scales = [1.0] * self.config.model.num_future_tokens
        totals = torch.zeros(2, len(scales), dtype=torch.float64, device=self.device)
        with self.head_phase.evaluating():
            for batch in (batch.to(self.device) for batch in batches):
                _, nll_sums = self.engine(batch.inputs, batch.targets, scales, batch.documents)
                totals += torch.stack((nll_sums, (batch.targets != IGNORED).sum(dim=(1, 2))))
        return totals.flatten()

    def state(self) -> EngineState:
        """See Engine.state."""
        return engine_state(self.engine)

    def load(self, checkpoint: Path) -> None:
        """See Engine.load."""
        load_state(self.engine, checkpoint, self.config.engine.kind, self.rank, self.world_size)


def _build_model(config: Config, settings: dict, device: torch.device) -> MTPModel:
    """The model with its initial weights; under ZeRO-3 no rank ever holds more than one whole parameter."""
    sharded = config.engine.kind == "zero3"
    # zero.Init is given the settings alone: its dtype argument turns fp32 into bf16 on CPUs.
    place = deepspeed.zero.Init(config_dict_or_path=settings) if sharded else torch.device("meta")
    with place:
        model = MTPModel(
            config.model,
            config.head_loss,
            config.engine.head_schedule,
            recompute_trunk=config.train.activation_checkpointing,
            compile_layers=device.type == "cuda" if config.train.compile is None else config.train.compile,
        )
    if sharded:
        set_z3_leaf_modules(model, [TransformerLayer])  # one gather per layer, no hooks inside
    else:
        model = model.to(DTYPES[config.train.precision]).to_empty(device=device)
    if config.cluster.emulate and sharded:
        fill_shards(model, STANDARD_DEVIATION)
    else:
        _initialise(model, config, sharded)
    return model


def _initialise(model: MTPModel, config: Config, sharded: bool) -> None:
    """Gives every parameter its initial value. Of sharded ones, each rank draws or reads every D-th, all at the same time."""
    initial = initial_weights(config)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if sharded else (0, 1)
    parameters = list(model.named_parameters())
    for first in range(0, len(parameters), world_size):
        group = parameters[first : first + world_size]
        value = None
        if rank < len(group):
            name, parameter = group[rank]
            value = initial(name, full_shape(parameter))
        for owner, (_, parameter) in enumerate(group):
            gathered = deepspeed.zero.GatheredParameters([parameter], modifier_rank=owner) if sharded else contextlib.nullcontext()
            with gathered, torch.no_grad():
                if owner == rank:
                    parameter.copy_(value)
