"""The layers of one pipeline stage as the module that DeepSpeed's pipeline engine runs."""

import contextlib
import io
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.module import PipelineModule
from torch import Tensor, nn

from megamtp.config import Config
from megamtp.data.loader import Batch
from megamtp.engines.base import DTYPES
from megamtp.engines.initial_weights import initial_weights
from megamtp.losses.linear_cross_entropy import SharedGradient
from megamtp.losses.sequential import HeadPhase, PassingHeads, SequentialHeadLoss
from megamtp.model.documents import separate
from megamtp.model.heads import Unembedding
from megamtp.model.layers import Separation, TransformerLayer
from megamtp.planning.partition import Partition, Stage


class StageLayers(nn.Module):
    """A stage's part of an MTPModel, its parameters named as there, and what it does with each micro-batch.

    Between stages travels z alone. The losses stay where they are computed, and every stage reads its own batches.

    Attributes:
        own: this stage of the partition.
        embedding, trunk, heads, unembedding: as in MTPModel, without what other stages have (embedding and unembedding: None).
        head_phase: seeds the heads' backward passes; an engine sets its own.
        nll_sums: [n], see StepResult; since `begin`.
    """

    def __init__(self, config: Config, own: Stage, device: torch.device):
        super().__init__()
        self.config, self.own, self.device = config, own, device
        self._make_layers()

    def begin(self, batches: Iterable[Batch], loss_scales: list[float]) -> None:
        """Before a step or an evaluation: its micro-batches, on the device, and the factor of each head's loss."""
        self.batches, self.loss_scales = iter(batches), loss_scales
        self.nll_sums = torch.zeros(self.config.model.num_future_tokens, dtype=torch.float64, device=self.device)

    def forward(self, x: Tensor) -> Tensor:
        """One micro-batch, in the order of `begin`.

        Args:
            x: token ids [B, T] in the first stage, else what the stage before returned.

        Returns:
            What the trunk has made of it so far, [B, T, D]; z from its end on; in the last stage the loss of its heads.
        """
        batch = next(self.batches)
        separation = self._separation(batch)
        x = self._run_trunk(x, separation)
        return self._run_heads(x, batch.targets, separation) if self.heads else x

    def _separation(self, batch: Batch) -> Separation | None:
        if batch.documents is None:
            return None
        in_blocks = self.compiled and self.device.type == "cuda"
        return separate(batch.documents, self.config.model, DTYPES[self.config.train.precision], in_blocks)

    def _run_trunk(self, x: Tensor, separation: Separation | None) -> Tensor:
        if self.embedding:
            x = self.embedding(x)
        for layer in self.trunk.values():
            x = layer(x, separation)
        return x

    def _run_heads(self, z_BTD: Tensor, targets_NBT: Tensor, separation: Separation | None) -> Tensor:
        settings, own = self.config.head_loss, self.own.heads
        shared_gradient, seed = SharedGradient(num_uses=len(own)), self.head_phase.seed()

        def head_loss(index: int, z_BTD: Tensor) -> tuple[Tensor, Tensor]:
            head = own[index]
            return self.unembedding(
                self.heads[str(head)](z_BTD, separation),
                targets_NBT[head],
                scale=self.loss_scales[head],
                seed=seed,
                seed_is_certain=True,
                z_loss=settings.z_loss,
                chunk_rows=settings.chunk_rows,
                shared_gradient=shared_gradient,
            )

        is_last = self.own.end == self.config.model.num_layers
        if not torch.is_grad_enabled():
            nll_sums = torch.stack([head_loss(index, z_BTD)[1] for index in range(len(own))])
            result = nll_sums.sum() if is_last else z_BTD
        elif is_last:
            result, nll_sums = SequentialHeadLoss.apply(z_BTD, head_loss, len(own), self.head_phase)
        else:
            result, nll_sums = PassingHeads.apply(z_BTD, head_loss, len(own), self.head_phase)
        self.nll_sums[own.start : own.stop] += nll_sums
        return result

    def _make_layers(self) -> None:
        """This stage's modules with their initial weights."""
        model, train = self.config.model, self.config.train
        self.compiled = self.device.type == "cuda" if train.compile is None else train.compile
        trunk = range(self.own.first, min(self.own.end, model.num_trunk_layers))
        with torch.device("meta"):
            self.embedding = nn.Embedding(model.vocab_size, model.dim) if self.own.first == 0 else None
            self.trunk = nn.ModuleDict(
                {str(index): TransformerLayer(model, train.activation_checkpointing, self.compiled) for index in trunk}
            )
            self.heads = nn.ModuleDict({str(index): TransformerLayer(model, compiled=self.compiled) for index in self.own.heads})
            self.unembedding = self._make_unembedding()
        self.head_phase = HeadPhase()
        self.to(DTYPES[train.precision]).to_empty(device=self.device)
        self._initialise()

    def _make_unembedding(self) -> nn.Module | None:
        return Unembedding(self.config.model) if self.heads else None

    def _initialise(self) -> None:
        initial = initial_weights(self.config)
        for name, parameter in self.named_parameters():
            parameter.data.copy_(self._own_part(name, initial))

    def _own_part(self, name: str, initial: Callable[[str, tuple[int, ...]], Tensor]) -> Tensor:
        return initial(name, tuple(self.get_parameter(name).shape))


class PipelineStage(StageLayers, PipelineModule):
    """This rank's stage as DeepSpeed's module; `forward` is what it calls for each micro-batch.

    Collective: all ranks build their stages together.

    Attributes:
        copies: group of all ranks with a copy of the unembedding, on several stages; None if it is on one, or not here.
    """

    def __init__(self, config: Config, cut: Partition, device: torch.device):
        self.config, self.cut, self.device = config, cut, device  # before PipelineModule's own, which calls _build
        names = [f"trunk.{index}" for index in range(config.model.num_trunk_layers)]
        names += [f"heads.{index}" for index in range(config.model.num_future_tokens)]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the place of every rank
            PipelineModule.__init__(self, names, num_stages=len(cut.stages))
        self.copies = self._copies()

    def _partition_layers(self, method: str) -> None:
        """PipelineModule's, with our cut. Source: deepspeed/runtime/pipe/module.py."""
        self.own = self.cut.stages[self._grid.get_stage_id()]
        self.parts = [0, *(stage.end for stage in self.cut.stages)]
        self._set_bounds(self.own.first, self.own.end)

    def _build(self) -> None:
        """PipelineModule's."""
        self._make_layers()
        for parameter in self.parameters():
            parameter.ds_pipe_replicated = False
        for parameter in self.copied_parameters if self.own.heads.start > 0 else ():
            parameter.ds_pipe_replicated = True  # the gradient's norm counts the first copy alone

    @property
    def copied_parameters(self) -> list[nn.Parameter]:
        """Those of which every stage with heads has a copy."""
        return list(self.unembedding.parameters()) if self.heads else []

    def _copies(self) -> dist.ProcessGroup | None:
        stages = [index for index, stage in enumerate(self.cut.stages) if stage.heads]
        if len(stages) == 1:
            return None
        pipelines = range(self._grid.get_data_parallel_world_size())
        ranks = sorted(self._grid.stage_to_global(stage_id=stage, data=pipeline) for stage in stages for pipeline in pipelines)
        group = dist.new_group(ranks)
        return group if self.heads else None
