"""ZeRO-1 and ZeRO-3 through DeepSpeed, with sequential heads.

Source: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

import contextlib
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from megamtp.config import Config
from megamtp.data.loader import Batch
from megamtp.engines.base import StepResult, loss_scales
from megamtp.engines.deepspeed_config import deepspeed_config
from megamtp.engines.head_phase import DeepSpeedHeadPhase, full_shape
from megamtp.engines.traffic import GroupedTraffic, fill_shards
from megamtp.errors import CheckpointError
from megamtp.losses.softmax_gradient import IGNORED
from megamtp.model.initial import STANDARD_DEVIATION, initial_value
from megamtp.model.layers import TransformerLayer
from megamtp.model.mtp import MTPModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        self.device = torch.device(get_accelerator().current_device_name())
        settings = deepspeed_config(config, self.world_size)
        self.model = _build_model(config, settings, self.device)
        self.engine, *_ = deepspeed.initialize(
            model=self.model, optimizer=_optimizer(config, self.model), config=settings, dist_init_required=False
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
            for index, batch in enumerate(micro_batches):
                # (c) DeepSpeed tells its optimizer only when the outer backward starts; the heads' reductions come before it.
                self.engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
                loss, micro_nll_sums = self.engine(batch.inputs.to(self.device), batch.targets.to(self.device), scales)
                self.engine.backward(loss)
                self.engine.step()
                nll_sums += micro_nll_sums
        return StepResult(nll_sums, float(self.engine.get_global_grad_norm()), self.engine.was_step_applied() is False)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Tensor:
        """See Engine.evaluate."""
        self.engine.eval()
        scales = [1.0] * self.config.model.num_future_tokens
        totals = torch.zeros(2, len(scales), dtype=torch.float64, device=self.device)
        with self.head_phase.evaluating():
            for batch in batches:
                targets = batch.targets.to(self.device)
                _, nll_sums = self.engine(batch.inputs.to(self.device), targets, scales)
                totals += torch.stack((nll_sums, (targets != IGNORED).sum(dim=(1, 2))))
        return totals.flatten()

    def save(self, directory: Path) -> None:
        """See Engine.save. DeepSpeed's own layout, one file per rank and kind of state, in `directory`/engine."""
        self.engine.save_checkpoint(str(directory), tag="engine", save_latest=False)
        torch.save(_random_states(), directory / f"random_rank{self.rank:05d}.pt")

    def load(self, directory: Path) -> None:
        """See Engine.load."""
        try:
            path, _ = self.engine.load_checkpoint(str(directory), tag="engine")
        except (KeyError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{directory} is damaged ({error!r}); remove it to go on from an older one") from None
        if path is None:
            raise CheckpointError(
                f"{directory}/engine holds no DeepSpeed checkpoint; remove {directory} to go on from an older one"
            )
        _set_random_states(torch.load(directory / f"random_rank{self.rank:05d}.pt", weights_only=True))


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
    """Gives every parameter its initial value. Of sharded ones, each rank draws every D-th, all at the same time."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if sharded else (0, 1)
    parameters = list(model.named_parameters())
    for first in range(0, len(parameters), world_size):
        group = parameters[first : first + world_size]
        value = None
        if rank < len(group):
            name, parameter = group[rank]
            value = initial_value(name, full_shape(parameter), config.model, config.train.seed)
        for owner, (_, parameter) in enumerate(group):
            gathered = deepspeed.zero.GatheredParameters([parameter], modifier_rank=owner) if sharded else contextlib.nullcontext()
            with gathered, torch.no_grad():
                if owner == rank:
                    parameter.copy_(value)


def _optimizer(config: Config, model: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW; weight decay for matrices, none for norms."""
    settings = config.optimizer
    matrices = [parameter for parameter in model.parameters() if len(full_shape(parameter)) > 1]
    vectors = [parameter for parameter in model.parameters() if len(full_shape(parameter)) == 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
