"""Runs forward and backward of a model in several ways: with megamtp, with FSDP2, or without an engine."""

import dataclasses
import gc
from collections.abc import Callable, Container, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks import exposure, output
from benchmarks.device import find_device, record_time, seconds_between, synchronize
from megamtp.config import Config
from megamtp.data.loader import Batch
from megamtp.engines.base import layer_options
from megamtp.engines.zero import ZeroEngine
from megamtp.model.initial import STANDARD_DEVIATION
from megamtp.model.mtp import MTPModel
from megamtp.model.unembedding import Unembedding
from megamtp.training.loop import freeze_garbage_collector

SHIPPED = "deepspeed as shipped"  # the name of Shipped in result files
LARGE = 2**24  # bytes
# variant: the variant whose n = 1 step it is compared with
ONE_HEAD = {"ours fp8": "ours", "fsdp2 per head": "fsdp2 one backward"}
# variant: the bare single-GPU step that it is compared with, if that is not "plain"
PLAIN = {"plain all fp8": "plain all fp8", "ours all fp8": "plain all fp8"}


class Variant:
    """A way to run a configuration.

    Attributes:
        micro_batches: number of micro-batches in a step of a rank, all with the same tokens.
    """

    def __init__(self, config: Config):
        self.config = config
        self.micro_batches = config.num_micro_batches(dist.get_world_size())
        n, vocabulary = config.model.num_future_tokens, config.model.vocab_size
        shape = config.train.micro_batch_size, config.train.sequence_length
        self.device = find_device()
        tokens = torch.randint(vocabulary, (shape[0], shape[1] + n), device=self.device)
        self.batch = Batch.from_tokens(tokens, shape[1])
        self.scales = [1.0 / (shape[0] * shape[1])] * n
        self.inputs = self.batch.inputs, self.batch.targets, self.scales, None, self.batch.following
        self.build()

    def build(self) -> None:
        """Builds the model on the device."""
        raise NotImplementedError

    def forward_and_backward(self) -> Tensor:
        """Runs all micro-batches of a step and returns the last loss. Variants may drop the gradients."""
        for _ in range(self.micro_batches):
            loss = self.one_micro_batch()
        return loss

    def one_micro_batch(self) -> Tensor:
        """Runs forward and backward of one micro-batch and returns its loss."""
        raise NotImplementedError

    def finish(self) -> None:
        """Runs the work after a step that is not measured."""

    def step(self) -> float:
        """Runs a step and returns the milliseconds of forward and backward on the device."""
        start = record_time(self.device)
        loss = self.forward_and_backward()
        end = record_time(self.device)
        synchronize(self.device)
        if not torch.isfinite(loss):
            raise RuntimeError(f"{type(self).__name__}: the loss is {loss}")
        self.finish()
        return 1e3 * seconds_between(start, end)

    def trace(self, times: int = 3) -> exposure.Trace:
        """Profiles `times` steps and returns the trace with the median exposed share of the head phase.

        If the program does not mark the head phase, the share of the whole step is used.
        """
        traces = []
        for _ in range(times):
            traces.append(exposure.record(self.forward_and_backward))
            self.finish()
        part = "heads" if "heads" in traces[0].parts else "step"
        return sorted(traces, key=lambda trace: trace.exposure(part).exposed_share)[times // 2]


def _random_model(config: Config, schedule: str, model_class: type[MTPModel] = MTPModel) -> MTPModel:
    """Returns an unsharded bf16 model with random weights on the device. On a GPU, its layers are compiled."""
    device = find_device()
    with torch.device("meta"):
        model = model_class(config.model, config.resolved_head_loss, schedule, layer_options(config.train, device))
    model = model.to(torch.bfloat16).to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, STANDARD_DEVIATION)
    return model


class Plain(Variant):
    """A bare single-GPU step without engine and communication. Gradients are freed as soon as they are computed."""

    def build(self) -> None:
        self.model = _random_model(self.config, "sequential")
        for parameter in self.model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))

    def one_micro_batch(self) -> Tensor:
        loss, _ = self.model(*self.inputs)
        loss.backward()
        return loss


class PlainAllFloat8(Plain):
    """Like Plain, with train.precision=fp8. Weights are quantised between steps, outside of the measured time."""

    def build(self) -> None:
        self.config = _all_in_float8(self.config)
        super().build()
        self.model.quantise_weights()

    def finish(self) -> None:
        self.model.quantise_weights()


class Ours(Variant):
    """megamtp's engine as pretrain builds it."""

    def build(self) -> None:
        self.engine = ZeroEngine(self.config)
        self.engine.deepspeed_engine.train()

    def forward_and_backward(self) -> Tensor:
        engine = self.engine.deepspeed_engine
        for index in range(self.micro_batches):
            engine.set_gradient_accumulation_boundary(index == self.micro_batches - 1)
            loss, _ = engine(*self.inputs)
            engine.backward(loss)
            if index < self.micro_batches - 1:
                engine.step()  # counts the micro-batch; `finish` calls it for the last micro-batch
        return loss

    def finish(self) -> None:
        self.engine.deepspeed_engine.step()


class OursFloat8(Ours):
    """Like Ours, with the losses of all heads in fp8. It is compared with the one-head step in bf16."""

    def build(self) -> None:
        self.config = dataclasses.replace(
            self.config, head_loss=dataclasses.replace(self.config.head_loss, precision="fp8")
        )
        super().build()


class OursAllFloat8(Ours):
    """Like Ours, with train.precision=fp8: the products of layers and losses, and the gathers of weights."""

    def build(self) -> None:
        self.config = _all_in_float8(self.config)
        super().build()


def _all_in_float8(config: Config) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, precision="fp8"))


class Shipped(Ours):
    """Like Ours, with DeepSpeed's own gathers and reductions."""

    def build(self) -> None:
        engine = dataclasses.replace(self.config.engine, communication="deepspeed")
        self.config = dataclasses.replace(self.config, engine=engine)
        super().build()


class TrunkFirst(MTPModel):
    """A model whose forward pass returns z, so that each head can have its own backward pass."""

    def forward(self, inputs_BT: Tensor) -> Tensor:  # type: ignore[override]  # arguments differ from MTPModel's, which torch allows
        return self.z(inputs_BT)


def _shard(model: MTPModel) -> None:
    mesh = init_device_mesh(find_device().type, (dist.get_world_size(),))
    for layer in [*model.trunk, *model.heads, model.embedding]:
        fully_shard(layer, mesh=mesh)
    for unembedding in (module for module in model.modules() if isinstance(module, Unembedding)):
        fully_shard(unembedding, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)


class FsdpOneBackward(Variant):
    """FSDP2 with fused losses in the forward pass and one backward pass through heads and trunk."""

    def build(self) -> None:
        self.model = _random_model(self.config, "deferred")
        _shard(self.model)

    def one_micro_batch(self) -> Tensor:
        loss, _ = self.model(*self.inputs)
        loss.backward()
        return loss

    def finish(self) -> None:
        self.model.zero_grad(set_to_none=True)


class FsdpPerHead(FsdpOneBackward):
    """FSDP2 with a backward pass for each head and one for the trunk, as in the paper."""

    def build(self) -> None:
        self.model = _random_model(self.config, "sequential", TrunkFirst)
        _shard(self.model)

    def one_micro_batch(self) -> Tensor:
        z = self.model(self.batch.inputs)
        z_heads = z.detach().requires_grad_()
        losses = []
        for index, (targets, scale) in enumerate(zip(self.batch.targets, self.scales, strict=True)):
            hidden = self.model.head(index)(z_heads)
            loss, *_ = self.model.unembedding_of(index)(hidden, targets, scale=scale)
            loss.backward()
            losses.append(loss.detach())
        z.backward(z_heads.grad)
        return torch.stack(losses).sum()


CLASSES: dict[str, type[Variant]] = {
    "plain": Plain,
    "ours": Ours,
    "ours fp8": OursFloat8,
    "plain all fp8": PlainAllFloat8,
    "ours all fp8": OursAllFloat8,
    "fsdp2 one backward": FsdpOneBackward,
    "fsdp2 per head": FsdpPerHead,
    SHIPPED: Shipped,
}


@dataclasses.dataclass
class Measurement:
    """The measurements of one cell (a variant with a number of heads).

    Attributes:
        milliseconds: of each step.
        kept_bytes: memory that the variant keeps between steps.
        peak_bytes: peak memory, including kept_bytes.
        allocation_retries: number of times that the allocator ran out of memory, freed its cache and tried again.
            Such steps take longer.
    """

    milliseconds: list[float] = dataclasses.field(default_factory=list)
    kept_bytes: int = 0
    peak_bytes: int = 0
    allocation_retries: int = 0


WARM_UP = 3  # steps of a new variant: the first steps compile and record the order of gathers


def measure(
    makers: Mapping[str, Callable[[], Variant]], rounds: int, steps: int, keep: bool = True
) -> dict[str, Measurement]:
    """Measures `steps` steps of each cell in each of `rounds` rounds.

    Args:
        keep: keep sharded variants in memory until the last round. Plain models are always rebuilt, because two of them
            do not fit in memory.
    """
    kept: dict[str, Variant] = {}
    measurements, initial_storages = {cell: Measurement() for cell in makers}, set(storages())
    for _ in range(rounds):
        for cell, make in makers.items():
            torch.cuda.empty_cache()  # memory cached for one variant's streams cannot be used by another's
            kept_storages, before = set(storages()), torch.cuda.memory_allocated()
            variant, measurement = kept.get(cell) or make(), measurements[cell]
            for _ in range(1 if cell in kept else WARM_UP):  # 1 fills the cache that was emptied above
                variant.step()
            if cell not in kept:
                measurement.kept_bytes = torch.cuda.memory_allocated() - before
            before_steps = torch.cuda.memory_allocated()
            if torch.cuda.is_available():  # the memory of a CPU is not measured
                torch.cuda.reset_peak_memory_stats()
            dist.barrier()
            retries = _allocation_retries()
            freeze_garbage_collector()  # training does this, too
            milliseconds = [variant.step() for _ in range(steps)]
            gc.unfreeze()
            output.say(f"{cell}: {output.spread(milliseconds)} ms")
            measurement.allocation_retries += _allocation_retries() - retries
            measurement.milliseconds += milliseconds
            # the memory of this variant alone, without the other variants that are kept
            peak = torch.cuda.max_memory_allocated() - before_steps + measurement.kept_bytes
            measurement.peak_bytes = max(measurement.peak_bytes, peak)
            if keep and not isinstance(variant, Plain):
                kept[cell] = variant
            else:
                del variant
                free(kept_storages)
    free(initial_storages)
    return measurements


def _allocation_retries() -> int:
    return torch.cuda.memory_stats().get("num_alloc_retries", 0)  # empty on a CPU


def traces(makers: Mapping[str, Callable[[], Variant]]) -> dict[str, exposure.Trace]:
    """Returns a trace of each cell, which is rebuilt for it. Returns no traces on a CPU, which has no streams.

    Call it after all measurements: once the profiler has run, it slows every later launch.

    Source: pytorch/pytorch issue 144455 (CUPTI stays attached).
    """
    traces: dict[str, exposure.Trace] = {}
    if not torch.cuda.is_available():
        return traces
    for cell, make in makers.items():
        kept_storages, variant = set(storages()), make()
        for _ in range(WARM_UP):
            variant.step()
        traces[cell] = variant.trace()
        del variant
        free(kept_storages)
    return traces


def free(kept: Container[int]) -> None:
    """Frees the device memory of all large tensors, except those at the addresses in `kept`.

    Deleting a variant is not enough: DeepSpeed's engines are never collected, because of reference cycles with their
    hooks that the garbage collector cannot see. Small tensors stay, because a cache may use them.
    """
    gc.collect()
    for pointer, storage in storages().items():
        if pointer not in kept and storage.nbytes() >= LARGE and storage.resizable():
            storage.resize_(0)
    torch.cuda.empty_cache()


def storages() -> dict[int, torch.UntypedStorage]:
    """Returns the storages of all tensors on the device, by address."""
    by_address = {}
    for tensor in gc.get_objects():
        if type(tensor) in (Tensor, nn.Parameter) and tensor.is_cuda:
            storage = tensor.untyped_storage()
            try:
                by_address[storage.data_ptr()] = storage
            except RuntimeError:  # a fake tensor of torch.compile, without memory
                continue
    return by_address
