"""Reports a run: metrics.jsonl (one JSON object per line), TensorBoard events and a progress bar."""

import json
import math
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from megamtp.config import Config
from megamtp.errors import InputError
from megamtp.files import write_atomically
from megamtp.model.cost import flops_per_token, peak_flops

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter  # imported where it is used: the import is slow

FILE = "metrics.jsonl"


class Metrics:
    """Times the phases of each step on every rank; rank 0 writes the records and prints.

    A resumed run drops the records of steps after its checkpoint, so that each step appears once in the file.
    """

    def __init__(self, config: Config, resumed_step: int, rank: int, world_size: int, device: torch.device):
        self.config, self.device, self.world_size = config, device, world_size
        self.seconds: dict[str, float] = {}
        self.is_writer = rank == 0
        self.flops_per_token = flops_per_token(config.model, config.train.sequence_length)
        self.peak_flops = config.run.peak_flops or _peak_flops_of(device, config.train.dtype)
        if not self.is_writer:
            return
        directory = Path(config.run.directory)
        _drop_later_records(directory / FILE, resumed_step)
        self.file = open(directory / FILE, "a", buffering=1)  # noqa: SIM115 - closed by close()
        self.events = _open_tensorboard(directory, resumed_step) if config.run.tensorboard else None
        self.bar = tqdm(total=config.train.steps, initial=resumed_step, unit="step", dynamic_ncols=True, smoothing=0.05)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the duration of the block to the seconds of this phase in the step's record."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def report_step(self, step: int, losses: list[float], gradient_norm: float, lr: float, skipped: bool) -> None:
        """Records one optimizer step and restarts the phase times.

        Args:
            losses: mean negative log-likelihood of each head, in nats per token.
        """
        seconds, self.seconds = self.seconds, {}
        if not self.is_writer:
            return
        tokens_per_second = self.config.train.global_batch_tokens / sum(seconds.values())
        flops_per_second = tokens_per_second * self.flops_per_token
        record = {
            "losses": list(map(_finite_or_none, losses)),
            "gradient_norm": _finite_or_none(gradient_norm),
            "lr": lr,
            "tokens_per_second": tokens_per_second,
            "flops_per_second": flops_per_second,
            "flops_share": flops_per_second / (self.peak_flops * self.world_size) if self.peak_flops else None,
            "peak_memory_bytes": _peak_memory_bytes(self.device),
            "seconds": seconds,
            "skipped": skipped,
        }
        self.bar.set_postfix_str(f"loss {_format_losses(losses)}, {tokens_per_second:,.0f} tokens/s", refresh=False)
        self.bar.update()
        if step % self.config.run.log_every_steps == 0 or step == self.config.train.steps:
            self._write("train", step, record)

    def report_evaluation(self, step: int, losses: list[float]) -> None:
        """Records and prints one evaluation. Its duration is in no step's record."""
        if self.is_writer:
            self._write("validation", step, {"losses": list(map(_finite_or_none, losses))})
            self.print_line(f"step {step}: validation loss {_format_losses(losses)}")

    def report_checkpoint(
        self, step: int, stored_bytes: int, write_seconds: float, copy_seconds: float, wait_seconds: float
    ) -> None:
        """Records and prints a checkpoint that has just been published.

        Args:
            write_seconds: the slowest rank's time to write its file, during which training continued.
            copy_seconds: how long training paused to copy the state.
            wait_seconds: how long training paused until the file was written. This is long if checkpoints follow each
                other faster than the disk can write, and at the end of training.
        """
        bandwidth = stored_bytes / write_seconds
        record = {
            "bytes": stored_bytes,
            "write_seconds": write_seconds,
            "bytes_per_second": bandwidth,
            "copy_seconds": copy_seconds,
            "wait_seconds": wait_seconds,
        }
        if self.is_writer:
            self._write("checkpoint", step, record)
            self.print_line(
                f"step {step}: saved {stored_bytes / 1e9:.3g} GB at {bandwidth / 1e9:.3g} GB/s; training paused "
                f"{copy_seconds:.3g} s for the copy and {wait_seconds:.3g} s for the disk"
            )

    def print_line(self, line: str) -> None:
        """Prints one line above the progress bar. A stdout that cannot be written is not an error."""
        if self.is_writer:
            with suppress(OSError):
                self.bar.write(line)

    def close(self) -> None:
        """Closes the progress bar, metrics.jsonl and the TensorBoard events."""
        if self.is_writer:
            self.bar.close()
            self.file.close()
            if self.events:
                self.events.close()

    def _write(self, kind: str, step: int, record: dict[str, Any]) -> None:
        self.file.write(json.dumps({"kind": kind, "step": step, **record}) + "\n")
        if self.events:
            for name, value in _scalars(record):
                self.events.add_scalar(f"{kind}/{name}", value, step)


def _format_losses(losses: list[float]) -> str:
    return " ".join(f"{loss:.3f}" for loss in losses)


def _finite_or_none(number: float) -> float | None:
    """Returns None for infinities and NaN, which JSON cannot represent."""
    return number if math.isfinite(number) else None


def _scalars(record: dict[str, Any]) -> list[tuple[str, float]]:
    scalars = [
        (f"loss/head{index}", loss) for index, loss in enumerate(record.get("losses", []), start=1) if loss is not None
    ]
    scalars += [(f"seconds/{name}", value) for name, value in record.get("seconds", {}).items()]
    return scalars + [(name, value) for name, value in record.items() if isinstance(value, (int, float))]


def read_record(line: str) -> dict[str, Any]:
    """Parses one line of metrics.jsonl. Its keys include "kind" (a string) and "step".

    Raises:
        ValueError: the line is damaged.
    """
    try:
        record = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ValueError("the record has no kind")
    step = record.get("step")
    if type(step) is not int or not 0 <= step < 2**63:
        raise ValueError("the record's step is not a whole number")
    return record


def records_until(path: Path, step: int) -> list[str]:
    """Returns the lines of steps up to `step`, without an incomplete last line. A missing file has no lines.

    Raises:
        InputError: the file cannot be read, or one of its lines is damaged.
    """
    try:
        lines = path.read_text(errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error}); expected a run's metrics: choose another run.directory"
        ) from None
    kept = []
    for number, line in enumerate(lines, start=1):
        if line.endswith("\n"):
            try:
                if read_record(line)["step"] <= step:
                    kept.append(line)
            except ValueError as error:
                raise InputError(
                    f"{path}, line {number} is damaged ({error!r}); expected a record: remove the line"
                ) from None
    return kept


def lacks_validation(path: Path, step: int) -> bool:
    """Returns whether a run's metrics lack the evaluation after `step`. Raises InputError like records_until."""
    records = map(read_record, records_until(path, step))
    return not any(record["kind"] == "validation" and record["step"] == step for record in records)


def _drop_later_records(path: Path, step: int) -> None:
    """Drops the records of later steps. The file is replaced atomically."""
    if not path.exists():
        return
    write_atomically(path, "".join(records_until(path, step)).encode())


def _open_tensorboard(directory: Path, resumed_step: int) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory / "tensorboard"), purge_step=resumed_step + 1)


def _peak_flops_of(device: torch.device, precision: str) -> float | None:
    return peak_flops(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def _peak_memory_bytes(device: torch.device) -> int:
    """Returns this rank's peak until now: allocated GPU memory, or resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
