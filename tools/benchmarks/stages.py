"""A stage of a pipeline on one device, as its engine runs it: the time of its passes, and its peak memory.

A stage has its weights, the fp32 sums that its gradients go to as soon as they appear, and as many micro-batches
between forward and backward pass as its schedule asks for. It lacks its peers and its optimizer, which works after the
last micro-batch.
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

WARM_UP = 2  # micro-batches whose times do not count: the first ones compile


@dataclass
class Measured:
    """Of one stage.

    Attributes:
        seconds: median times of a micro-batch's passes; STATISTICS and GRADIENTS of one head's loss.
        spreads: (least, largest) of each.
        peak_bytes: by the number of micro-batches between forward and backward; without what does not fit.
    """

    seconds: dict[PassKind, float]
    spreads: dict[PassKind, tuple[float, float]]
    peak_bytes: dict[int, int] = field(default_factory=dict)


class MeasuredStage(StagePart):
    """A stage whose heads have their losses where they are."""

    def __init__(self, config: Config, own: Stage, device: torch.device):
        super().__init__(config, own, device)
        self.sums = {}
        for name, parameter in self.named_parameters():
            self.sums[name] = torch.zeros_like(parameter, dtype=accumulation_dtype(parameter.dtype))
            parameter.register_post_accumulate_grad_hook(_Adding(self.sums[name]))
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
        """A micro-batch as it comes to this stage."""
        return self.tokens if self.embedding is not None else self.received.clone().requires_grad_()

    def run(self, kind: PassKind, passed: "Passed") -> None:
        """One pass of a micro-batch."""
        if kind == PassKind.FORWARD:
            passed.output = self(passed.input.clone())  # as DeepSpeed does
        elif kind == PassKind.BACKWARD:
            assert passed.output is not None
            passed.output.backward(self.gradient if passed.output.dim() else None)

    @property
    def kinds(self) -> list[PassKind]:
        """Of the passes that a micro-batch makes here, in their order."""
        return [PassKind.FORWARD, PassKind.BACKWARD]

    def num_uses(self, kind: PassKind) -> int:
        """How often a pass does what is asked for once."""
        return 1


class MeasuredSpreadStage(MeasuredStage):
    """A stage with a slice of the unembedding, for all heads' losses; its own heads are layers whose answer comes
    later.
    """

    def run(self, kind: PassKind, passed: "Passed") -> None:
        if kind == PassKind.FORWARD:
            passed.output = self.run_trunk(passed.input.clone())
            passed.hidden = self.normed_head_outputs(passed.output)
        elif kind == PassKind.STATISTICS:
            passed.slices = [self._statistics(index) for index in range(len(self.micro_batch_targets))]
        elif kind == PassKind.GRADIENTS:
            assert passed.slices is not None
            weight = self.unembedding_weight
            d_weight = torch.zeros_like(weight, dtype=accumulation_dtype(weight.dtype))
            passed.gradients = [self._gradients(index, *found, d_weight) for index, found in enumerate(passed.slices)]
            torch.autograd.backward(weight.view_as(weight), d_weight.to(weight.dtype))
            passed.slices = None
        else:
            assert passed.output is not None
            gradients = (passed.gradients or [self.gradient] * len(passed.hidden))[: len(passed.hidden)]
            sent = [(passed.output, self.gradient)] if self.stage.end < self.config.num_layers else []
            sent += [
                (hidden, gradient.view_as(hidden)) for hidden, gradient in zip(passed.hidden, gradients, strict=True)
            ]
            torch.autograd.backward([output for output, _ in sent], [gradient for _, gradient in sent])

    def _statistics(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden states as they come from their stage; logits; statistics) of one head."""
        hidden_ND = self.received.clone().flatten(0, -2)
        targets_N = self.micro_batch_targets[index].flatten()
        return hidden_ND, *self.slice_statistics(hidden_ND, targets_N)

    def _gradients(
        self, index: int, hidden_ND: Tensor, logits_NR: Tensor, statistics_3N: Tensor, d_weight_RD: Tensor
    ) -> Tensor:
        targets_N = self.micro_batch_targets[index].flatten()
        _, log_partition_N = combine_statistics(statistics_3N[None], targets_N)
        return self.slice_gradients(
            logits_NR, hidden_ND, targets_N, log_partition_N, d_weight_RD, self.loss_scales[index]
        )

    @property
    def kinds(self) -> list[PassKind]:
        return list(PassKind) if self.stage.contents.rows else [PassKind.FORWARD, PassKind.BACKWARD]

    def num_uses(self, kind: PassKind) -> int:
        return len(self.micro_batch_targets) if kind in (PassKind.STATISTICS, PassKind.GRADIENTS) else 1


@dataclass
class Passed:
    """What a stage keeps of a micro-batch between its passes."""

    input: Tensor
    output: Tensor | None = None
    hidden: list[Tensor] = field(default_factory=list)
    slices: list[tuple[Tensor, Tensor, Tensor]] | None = None
    gradients: list[Tensor] | None = None


class _Adding:
    """Adds a parameter's gradient to its sum as soon as it is there, as engines/pipeline.py does."""

    def __init__(self, total: Tensor):
        self.total = total

    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is not None:  # as after the use of the unembedding by a head that is not the stage's last
            self.total.add_(parameter.grad)
            parameter.grad = None


def measure(config: Config, own: Stage, alive: Iterable[int], device: torch.device, micro_batches: int) -> Measured:
    """Times of `micro_batches` micro-batches one after the other, and the peak for each number of `alive` ones."""
    before = _allocated(device)
    stage = (MeasuredSpreadStage if own.contents.spread else MeasuredStage)(config, own, device)
    try:
        seconds = _times(stage, micro_batches)
        found = Measured(
            {kind: statistics.median(times) for kind, times in seconds.items()},
            {kind: (min(times), max(times)) for kind, times in seconds.items()},
        )
        for count, peak in _peaks(stage, sorted(set(alive))):
            found.peak_bytes[count] = peak - before
    finally:
        del stage
        release(device)
    return found


def release(device: torch.device) -> None:
    """Gives a GPU's freed memory back."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _times(stage: MeasuredStage, micro_batches: int) -> dict[PassKind, list[float]]:
    """Seconds of each pass. The host does not wait for the device in between, so that launches are hidden as in
    training.
    """
    marks = []
    for index in range(WARM_UP + micro_batches):
        passed = Passed(stage.receive())
        found = [record_time(stage.device)]
        for kind in stage.kinds:
            stage.run(kind, passed)
            found.append(record_time(stage.device))
        if index == 0 and stage.device.type == "cuda":
            torch.cuda.synchronize()  # the compiler has worked meanwhile
        marks.append(found)
    _check(stage, passed)
    return {
        kind: [seconds_between(found[place], found[place + 1]) / stage.num_uses(kind) for found in marks[WARM_UP:]]
        for place, kind in enumerate(stage.kinds)
    }


def _check(stage: MeasuredStage, passed: Passed) -> None:
    """Waits for the device. Raises RuntimeError: what was measured computed nonsense."""
    assert passed.output is not None
    totals = [total.abs().max() for total in stage.sums.values()]
    if not torch.isfinite(torch.stack(totals)).all() or not torch.isfinite(passed.output).all():
        raise RuntimeError(f"stage {stage.stage.contents}: a gradient or an output is not finite")


def _peaks(stage: MeasuredStage, counts: list[int]) -> Iterable[tuple[int, int]]:
    """(micro-batches alive, peak bytes), upwards, until one does not fit; nothing on a CPU, whose memory is not
    counted.
    """
    if stage.device.type != "cuda":
        return
    waiting: collections.deque[Passed] = collections.deque()
    for count in counts:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        try:
            while len(waiting) < count:
                waiting.append(Passed(stage.receive()))
                stage.run(PassKind.FORWARD, waiting[-1])
            done = waiting.popleft()
            for kind in stage.kinds[1:]:
                stage.run(kind, done)
            del done
        except torch.OutOfMemoryError:
            print(f"{count} micro-batches of {stage.stage.contents} do not fit", flush=True)
            return
        torch.cuda.synchronize()
        yield count, torch.cuda.max_memory_allocated()


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0
