"""Measures one stage of a pipeline on one device: the time of its passes, and its peak memory.

The stage runs as in the pipeline engine. It has its weights, the fp32 sums to which gradients are added as soon as they
are computed, and as many micro-batches in flight as its schedule needs. It has no peers, and no optimizer, which runs
after the last micro-batch.
"""

import collections
import gc
import itertools
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.device import record_time, seconds_between
from megamtp.config import Config
from megamtp.data.loader import Batch
from megamtp.engines.base import DTYPES
from megamtp.engines.stage import StagePart
from megamtp.losses.linear_cross_entropy import accumulation_dtype
from megamtp.losses.vocabulary_slice import combine_statistics
from megamtp.model.initial import STANDARD_DEVIATION
from megamtp.planning.partition import Stage
from megamtp.planning.spread_schedule import PassKind

WARM_UP = 2  # micro-batches that are not measured: the first ones compile


@dataclass
class StageMeasurement:
    """The measurements of one stage.

    Attributes:
        seconds: median time of each pass of a micro-batch; for STATISTICS and GRADIENTS, of one head's loss.
        spreads: (minimum, maximum) of each time.
        peak_bytes: {micro-batches in flight: peak memory}, only for numbers that fit.
    """

    seconds: dict[PassKind, float]
    spreads: dict[PassKind, tuple[float, float]]
    peak_bytes: dict[int, int] = field(default_factory=dict)


class MeasuredStage(StagePart):
    """A stage that computes the losses of its own heads."""

    def __init__(self, config: Config, stage: Stage, device: torch.device):
        super().__init__(config, stage, device)
        self.sums = {}
        for name, parameter in self.named_parameters():
            self.sums[name] = torch.zeros_like(parameter, dtype=accumulation_dtype(parameter.dtype))
            parameter.register_post_accumulate_grad_hook(_AddToSum(self.sums[name]))
        model, train = config.model, config.train
        shape = train.micro_batch_size, train.sequence_length
        self.tokens = torch.randint(model.vocab_size, shape, device=device)
        self.received = torch.randn(*shape, model.dim, device=device, dtype=DTYPES[train.precision])
        self.gradient = self.received * 1e-4
        self.micro_batch_targets = torch.randint(model.vocab_size, (model.num_future_tokens, *shape), device=device)
        batch = Batch(self.tokens, self.micro_batch_targets)
        self.begin(itertools.repeat(batch), [1.0 / (shape[0] * shape[1])] * model.num_future_tokens)

    @torch.no_grad()
    def initialise(self) -> None:
        for parameter in self.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, STANDARD_DEVIATION)

    def receive(self) -> Tensor:
        """Returns the input of a micro-batch: tokens on the first stage, otherwise hidden states."""
        return self.tokens if self.embedding is not None else self.received.clone().requires_grad_()

    def run(self, kind: PassKind, state: "StageMicroBatch") -> None:
        """Runs one pass of a micro-batch and stores its results in `state`."""
        if kind == PassKind.FORWARD:
            state.output = self(state.input.clone())  # DeepSpeed copies the input, too
        elif kind == PassKind.BACKWARD:
            assert state.output is not None
            state.output.backward(self.gradient if state.output.dim() else None)  # a loss is a scalar

    @property
    def kinds(self) -> list[PassKind]:
        """The passes of a micro-batch on this stage, in order."""
        return [PassKind.FORWARD, PassKind.BACKWARD]

    def num_losses(self, kind: PassKind) -> int:
        """Returns the number of losses in a pass of kind STATISTICS or GRADIENTS, otherwise 1. It divides the time."""
        return 1


class MeasuredSpreadStage(MeasuredStage):
    """A stage that computes the losses of all heads for a slice of the unembedding.

    Its own heads run like layers: their gradients arrive after the losses on all stages.
    """

    def run(self, kind: PassKind, state: "StageMicroBatch") -> None:
        if kind == PassKind.FORWARD:
            state.output, state.hidden = self.run_layers(state.input.clone(), next(self.batches))
        elif kind == PassKind.STATISTICS:
            state.slices = [self._statistics(index) for index in range(len(self.micro_batch_targets))]
        elif kind == PassKind.GRADIENTS:
            assert state.slices is not None
            weights = [self.unembedding_weight(index) for index in range(len(state.slices))]
            d_weights = {
                weight: torch.zeros_like(weight, dtype=accumulation_dtype(weight.dtype)) for weight in set(weights)
            }
            state.gradients = [
                self._gradients(index, *head_slice, d_weights[weight])
                for index, (head_slice, weight) in enumerate(zip(state.slices, weights, strict=True))
            ]
            for weight, d_weight in d_weights.items():
                # through autograd, so that the hook that adds gradients to the sums runs
                torch.autograd.backward(weight.view_as(weight), d_weight.to(weight.dtype))
            state.slices = None
        else:
            assert state.output is not None
            # In a pipeline, the gradients of the stage's own heads are sums over all slices. Here tensors of the same
            # size replace them: the gradients of this slice, or a fixed tensor if the stage has no rows.
            replacements = state.gradients or [self.gradient] * len(state.hidden)
            gradients = replacements[: len(state.hidden)]
            roots = [(state.output, self.gradient)] if self.stage.end < self.config.num_layers_and_heads else []
            roots += [
                (hidden, gradient.view_as(hidden)) for hidden, gradient in zip(state.hidden, gradients, strict=True)
            ]
            torch.autograd.backward([output for output, _ in roots], [gradient for _, gradient in roots])

    def _statistics(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (hidden states as received from the head's stage, logits, statistics) of one head."""
        hidden_ND = self.received.clone().flatten(0, -2)
        targets_N = self.micro_batch_targets[index].flatten()
        return hidden_ND, *self.slice_statistics(index, hidden_ND, targets_N)

    def _gradients(
        self, index: int, hidden_ND: Tensor, logits_NR: Tensor, statistics_3N: Tensor, d_weight_RD: Tensor
    ) -> Tensor:
        targets_N = self.micro_batch_targets[index].flatten()
        _, log_partition_N = combine_statistics(statistics_3N[None], targets_N)
        return self.slice_gradients(
            index, logits_NR, hidden_ND, targets_N, log_partition_N, d_weight_RD, self.loss_scales[index]
        )

    @property
    def kinds(self) -> list[PassKind]:
        return list(PassKind) if self.stage.contents.rows else [PassKind.FORWARD, PassKind.BACKWARD]

    def num_losses(self, kind: PassKind) -> int:
        return len(self.micro_batch_targets) if kind in (PassKind.STATISTICS, PassKind.GRADIENTS) else 1


@dataclass
class StageMicroBatch:
    """The tensors of a micro-batch that a stage keeps between its passes."""

    input: Tensor
    output: Tensor | None = None
    hidden: list[Tensor] = field(default_factory=list)
    slices: list[tuple[Tensor, Tensor, Tensor]] | None = None
    gradients: list[Tensor] | None = None


class _AddToSum:
    """Adds the gradient of a parameter to its sum as soon as it is computed, as engines/pipeline.py does."""

    def __init__(self, total: Tensor):
        self.total = total

    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is not None:  # None if the unembedding still waits for gradients of later heads
            self.total.add_(parameter.grad)
            parameter.grad = None


def measure(
    config: Config, stage: Stage, in_flight: Iterable[int], device: torch.device, micro_batches: int
) -> StageMeasurement:
    """Measures the times of `micro_batches` micro-batches, and the peak for each number of micro-batches in flight."""
    before = _allocated(device)
    measured_stage = (MeasuredSpreadStage if stage.contents.spread else MeasuredStage)(config, stage, device)
    try:
        seconds = _times(measured_stage, micro_batches)
        measurement = StageMeasurement(
            {kind: statistics.median(times) for kind, times in seconds.items()},
            {kind: (min(times), max(times)) for kind, times in seconds.items()},
        )
        for count, peak in _peaks(measured_stage, sorted(set(in_flight))):
            measurement.peak_bytes[count] = peak - before
    finally:
        del measured_stage
        _release(device)
    return measurement


def _release(device: torch.device) -> None:
    """Frees objects in reference cycles, and returns the cached memory of a GPU to the driver."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _times(stage: MeasuredStage, micro_batches: int) -> dict[PassKind, list[float]]:
    """Returns the seconds of each pass.

    The host does not wait for the device between passes, so the device does not wait for launches, as in training.
    """
    all_times = []
    for index in range(WARM_UP + micro_batches):
        state = StageMicroBatch(stage.receive())
        times = [record_time(stage.device)]
        for kind in stage.kinds:
            stage.run(kind, state)
            times.append(record_time(stage.device))
        if index == 0 and stage.device.type == "cuda":
            torch.cuda.synchronize()  # compilation delayed this micro-batch: start the next on an idle device
        all_times.append(times)
    _require_finite(stage, state)
    return {
        kind: [
            seconds_between(times[index], times[index + 1]) / stage.num_losses(kind) for times in all_times[WARM_UP:]
        ]
        for index, kind in enumerate(stage.kinds)
    }


def _require_finite(stage: MeasuredStage, state: StageMicroBatch) -> None:
    """Waits for the device. Raises RuntimeError if a gradient or an output is not finite."""
    assert state.output is not None
    totals = [total.abs().max() for total in stage.sums.values()]
    if not torch.isfinite(torch.stack(totals)).all() or not torch.isfinite(state.output).all():
        raise RuntimeError(f"stage {stage.stage.contents}: a gradient or an output is not finite")


def _peaks(stage: MeasuredStage, counts: list[int]) -> Iterable[tuple[int, int]]:
    """Yields (micro-batches in flight, peak bytes) in rising order, until a number does not fit.

    Yields nothing on a CPU, whose memory is not measured.
    """
    if stage.device.type != "cuda":
        return
    in_flight: collections.deque[StageMicroBatch] = collections.deque()
    for count in counts:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        try:
            while len(in_flight) < count:
                in_flight.append(StageMicroBatch(stage.receive()))
                stage.run(PassKind.FORWARD, in_flight[-1])
            oldest = in_flight.popleft()
            for kind in stage.kinds[1:]:
                stage.run(kind, oldest)
            del oldest
        except torch.OutOfMemoryError:
            print(f"{stage.stage.contents}: {count} micro-batches in flight do not fit", flush=True)
            return
        torch.cuda.synchronize()
        yield count, torch.cuda.max_memory_allocated()


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0
