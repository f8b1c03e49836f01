"""Ways to run forward and backward of one model, measured alike: ours, FSDP2's two, and none at all."""

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
from megamtp.engines.zero import ZeroEngine
from megamtp.model.initial import STANDARD_DEVIATION
from megamtp.model.mtp import MTPModel
from megamtp.training.loop import freeze_garbage_collector

NAMES = ("plain", "ours", "ours fp8", "fsdp2 one backward", "fsdp2 per head", "deepspeed as shipped")
LARGE = 2**24  # bytes
ONE_HEAD = {"ours fp8": "ours", "fsdp2 per head": "fsdp2 one backward"}  # where n = 1 is another variant's


class Variant:
    """One way to run a configuration. `step` returns the milliseconds of forward and backward on the device.

    Attributes:
        micro_batches: of a rank's step, all on the same tokens.
    """

    def __init__(self, config: Config):
        self.config = config
        self.micro_batches = config.num_micro_batches(dist.get_world_size())
        n, vocabulary = config.model.num_future_tokens, config.model.vocab_size
        shape = config.train.micro_batch_size, config.train.sequence_length
        self.device = find_device()
        tokens = torch.randint(vocabulary, (shape[0], shape[1] + n), device=self.device)
        self.batch = Batch(tokens[:, : shape[1]].contiguous(), tokens[:, 1:].unfold(1, shape[1], 1).permute(1, 0, 2))
        self.scales = [1.0 / (shape[0] * shape[1])] * n
        self.build()

    def build(self) -> None:
        """Makes the model on the device."""
        raise NotImplementedError

    def forward_and_backward(self) -> Tensor:
        """All micro-batches of a step; the last one's loss. Gradients are where the variant leaves them."""
        for _ in range(self.micro_batches):
            loss = self.one_micro_batch()
        return loss

    def one_micro_batch(self) -> Tensor:
        """Its loss."""
        raise NotImplementedError

    def finish(self) -> None:
        """What follows a step and is not measured."""

    def step(self) -> float:
        start = record_time(self.device)
        loss = self.forward_and_backward()
        end = record_time(self.device)
        synchronize(self.device)
        if not torch.isfinite(loss):
            raise RuntimeError(f"{type(self).__name__}: the loss is {loss}")
        self.finish()
        return 1e3 * seconds_between(start, end)

    def trace(self, times: int = 3) -> exposure.Trace:
        """Of `times` profiled steps the one whose head phase, or where none is named the step, has the median
        exposed share.
        """
        traces = []
        for _ in range(times):
            traces.append(exposure.record(self.forward_and_backward))
            self.finish()
        part = "heads" if "heads" in traces[0].parts else "step"
        return sorted(traces, key=lambda trace: trace.exposure(part).share)[times // 2]


def _random_model(config: Config, schedule: str, model_class: type[MTPModel] = MTPModel) -> MTPModel:
    """A bf16 model on the device, whole; on a GPU with compiled layers."""
    device = find_device()
    with torch.device("meta"):
        model = model_class(config.model, config.head_loss, schedule, compile_layers=device.type == "cuda")
    model = model.to(torch.bfloat16).to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, STANDARD_DEVIATION)
    return model


class Plain(Variant):
    """No engine, no communication: the limit. Gradients are dropped as soon as they are there, since nobody collects
    them.
    """

    def build(self) -> None:
        self.model = _random_model(self.config, "sequential")
        for parameter in self.model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))

    def one_micro_batch(self) -> Tensor:
        loss, _ = self.model(self.batch.inputs, self.batch.targets, self.scales)
        loss.backward()
        return loss


class Ours(Variant):
    """The engine as pretrain builds it."""

    def build(self) -> None:
        self.engine = ZeroEngine(self.config)
        self.engine.deepspeed_engine.train()

    def forward_and_backward(self) -> Tensor:
        engine = self.engine.deepspeed_engine
        for index in range(self.micro_batches):
            engine.set_gradient_accumulation_boundary(index == self.micro_batches - 1)
            loss, _ = engine(self.batch.inputs, self.batch.targets, self.scales)
            engine.backward(loss)
            if index < self.micro_batches - 1:
                engine.step()  # counts the micro-batch; the last one's is the optimizer's
        return loss

    def finish(self) -> None:
        self.engine.deepspeed_engine.step()


class OursFloat8(Ours):
    """All heads' losses in fp8. With one head, the bf16 step is what it is compared to."""

    def build(self) -> None:
        self.config = dataclasses.replace(
            self.config, head_loss=dataclasses.replace(self.config.head_loss, precision="fp8")
        )
        super().build()


class Shipped(Ours):
    """The same heads on DeepSpeed's own gathers and reductions."""

    def build(self) -> None:
        engine = dataclasses.replace(self.config.engine, communication="deepspeed")
        self.config = dataclasses.replace(self.config, engine=engine)
        super().build()


class TrunkFirst(MTPModel):
    """Its forward pass ends at z, so that the heads can have their own backward passes."""

    def forward(self, inputs_BT: Tensor) -> Tensor:  # type: ignore[override]  # other arguments than MTPModel's, as torch allows
        return self.z(inputs_BT)


def _shard(model: MTPModel) -> None:
    mesh = init_device_mesh(find_device().type, (dist.get_world_size(),))
    for layer in [*model.trunk, *model.heads, model.embedding]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.unembedding, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)


class FsdpOneBackward(Variant):
    """FSDP2; the fused losses in the forward pass, then one backward pass through heads and trunk."""

    def build(self) -> None:
        self.model = _random_model(self.config, "deferred")
        _shard(self.model)

    def one_micro_batch(self) -> Tensor:
        loss, _ = self.model(self.batch.inputs, self.batch.targets, self.scales)
        loss.backward()
        return loss

    def finish(self) -> None:
        self.model.zero_grad(set_to_none=True)


class FsdpPerHead(FsdpOneBackward):
    """FSDP2; a backward pass for each head, then one for the trunk: what the paper did."""

    def build(self) -> None:
        self.model = _random_model(self.config, "sequential", TrunkFirst)
        _shard(self.model)

    def one_micro_batch(self) -> Tensor:
        z = self.model(self.batch.inputs)
        z_heads = z.detach().requires_grad_()
        losses = []
        for head, targets, scale in zip(self.model.heads, self.batch.targets, self.scales, strict=True):
            loss, _ = self.model.unembedding(head(z_heads), targets, scale=scale)
            loss.backward()
            losses.append(loss.detach())
        z.backward(z_heads.grad)
        return torch.stack(losses).sum()


CLASSES = dict(zip(NAMES, (Plain, Ours, OursFloat8, FsdpOneBackward, FsdpPerHead, Shipped), strict=True))


@dataclasses.dataclass
class Measurement:
    """Of one cell: each step's milliseconds, and the bytes that the variant needs at most, those it keeps included.

    Attributes:
        allocation_retries: how often memory ran out and was cleared in these steps, which take longer then.
    """

    milliseconds: list[float] = dataclasses.field(default_factory=list)
    kept_bytes: int = 0
    peak_bytes: int = 0
    allocation_retries: int = 0


WARM_UP = 3  # steps of a new variant: the first ones compile, and record the order of fetches


def measure(
    makers: Mapping[str, Callable[[], Variant]], rounds: int, steps: int, keep: bool = True
) -> dict[str, Measurement]:
    """`rounds` times over all cells in turn, `steps` measured steps each.

    Plain models are made anew in each round, for no two fit beside each other; the sharded ones stay to the end, if
    `keep`.
    """
    kept: dict[str, Variant] = {}
    found, all_others = {cell: Measurement() for cell in makers}, set(storages())
    for _ in range(rounds):
        for cell, make in makers.items():
            torch.cuda.empty_cache()  # what one variant's streams keep for themselves, another's lack
            others, before = set(storages()), torch.cuda.memory_allocated()
            variant, cell_found = kept.get(cell) or make(), found[cell]
            for _ in range(1 if cell in kept else WARM_UP):
                variant.step()
            if cell not in kept:
                cell_found.kept_bytes = torch.cuda.memory_allocated() - before
            resting = torch.cuda.memory_allocated()
            if torch.cuda.is_available():  # a CPU's memory is not counted
                torch.cuda.reset_peak_memory_stats()
            dist.barrier()
            retries = _allocation_retries()
            freeze_garbage_collector()  # as training does
            milliseconds = [variant.step() for _ in range(steps)]
            gc.unfreeze()
            output.say(f"{cell}: {output.spread(milliseconds)} ms")
            cell_found.allocation_retries += _allocation_retries() - retries
            cell_found.milliseconds += milliseconds
            peak = torch.cuda.max_memory_allocated() - resting + cell_found.kept_bytes
            cell_found.peak_bytes = max(cell_found.peak_bytes, peak)
            if keep and not isinstance(variant, Plain):
                kept[cell] = variant
            else:
                del variant
                free(others)
    free(all_others)
    return found


def _allocation_retries() -> int:
    return torch.cuda.memory_stats().get("num_alloc_retries", 0)  # nothing is counted on a CPU


def traces(makers: Mapping[str, Callable[[], Variant]]) -> dict[str, exposure.Trace]:
    """Of each cell, made anew. Nothing that is measured may follow: once it has run, the profiler slows every later
    launch. Nothing on a CPU, which has no streams to trace.

    Source: pytorch/pytorch issue 144455 (CUPTI stays attached).
    """
    found: dict[str, exposure.Trace] = {}
    if not torch.cuda.is_available():
        return found
    for cell, make in makers.items():
        others, variant = set(storages()), make()
        for _ in range(WARM_UP):
            variant.step()
        found[cell] = variant.trace()
        del variant
        free(others)
    return found


def free(others: Container[int]) -> None:
    """Takes the device's memory away from all large tensors that nobody needs any more, which is all but `others`
    (addresses).

    DeepSpeed's engines are never collected: their hooks and they hold each other in ways that the collector cannot see.
    What is small may be in somebody's cache.
    """
    gc.collect()
    for pointer, storage in storages().items():
        if pointer not in others and storage.nbytes() >= LARGE and storage.resizable():
            storage.resize_(0)
    torch.cuda.empty_cache()


def storages() -> dict[int, torch.UntypedStorage]:
    """The memory of all tensors on the device, by its address."""
    found = {}
    for tensor in gc.get_objects():
        if type(tensor) in (Tensor, nn.Parameter) and tensor.is_cuda:
            storage = tensor.untyped_storage()
            try:
                found[storage.data_ptr()] = storage
            except RuntimeError:  # torch.compile's stand-in for a tensor, which has no memory
                continue
    return found
