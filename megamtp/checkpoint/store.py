"""Where checkpoints lie and when they count: RUN/checkpoints/step-0000100, with a manifest that is written last.

A checkpoint is written as step-0000100.partial and renamed when all ranks have finished, so what bears the final name is whole.
"""

import dataclasses
import itertools
import json
import os
import re
import shutil
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamtp.config import ModelConfig
from megamtp.errors import CheckpointError

MANIFEST = "manifest.json"
TORCH_WRITERS = ("inline_container", "PytorchStreamWriter")  # named in torch.save's RuntimeError of a full disk
UNEMBEDDING = "unembedding.weight"
NAME = re.compile(r"step-(\d{7,})")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is of.

    Attributes:
        step: optimizer steps taken.
        file_bytes: size of every file, by path relative to the checkpoint.
    """

    step: int
    world_size: int
    engine_kind: str
    precision: str
    model: dict[str, Any]
    file_bytes: dict[str, int]


def checkpoints(run_directory: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = run_directory / "checkpoints"
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def newest_checkpoint(run_directory: Path) -> Path:
    """Raises: CheckpointError if there is none."""
    found = checkpoints(run_directory)
    if not found:
        raise CheckpointError(
            f"{run_directory} holds no checkpoint; expected {run_directory}/checkpoints/step-*: train there first"
        )
    return found[-1]


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest, after checking that every file is there in its full size.

    Raises:
        CheckpointError: something is missing, cut short or unreadable.
    """
    path = checkpoint / MANIFEST
    try:
        manifest = Manifest(**json.loads(path.read_text()))
        for field in dataclasses.fields(Manifest):
            kind, value = typing.get_origin(field.type) or field.type, getattr(manifest, field.name)
            if not isinstance(value, kind):
                raise TypeError(f"{field.name} is {value!r}, not of type {kind.__name__}")
    except FileNotFoundError:
        raise CheckpointError(
            f"{checkpoint} is not a checkpoint: it has no {MANIFEST}; give a run's folder or one of its checkpoints"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); remove {checkpoint} to go on from an older one") from None
    for name, size in manifest.file_bytes.items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(f"{file} {state}, expected {size} bytes; remove {checkpoint} to go on from an older one")
    return manifest


def check_fits(checkpoint: Path, manifest: Manifest, model: ModelConfig, world_size: int, engine_kind: str, precision: str) -> None:
    """Raises: CheckpointError if the checkpoint is of another model, or laid out for another job than this one."""
    wanted = {"model": dataclasses.asdict(model), "world_size": world_size, "engine_kind": engine_kind, "precision": precision}
    for key, value in wanted.items():
        found = getattr(manifest, key)
        if key == "model":
            for name, setting in value.items():
                if found.get(name) != setting:
                    raise CheckpointError(
                        f"{checkpoint} is of another model: model.{name}={found.get(name)}, expected {setting}; "
                        "change the configuration or run.directory"
                    )
        elif found != value:
            raise CheckpointError(
                f"{checkpoint} was written with {key.replace('_', ' ')} {found}, expected {value}; "
                f"go on with {found}, or choose another run.directory"
            )


def publish(
    run_directory: Path, manifest: Manifest, keep: int, rank: int, barrier: Callable[[], None], write: Callable[[Path], None]
) -> Path:
    """Writes a checkpoint on all ranks, makes it visible at once, and removes all but the newest `keep`. Collective.

    Args:
        manifest: without file sizes, which are filled in here.
        write: saves this rank's state into the folder it is given; collective.

    Raises:
        CheckpointError: it cannot be written, as when the disk is full; older checkpoints are untouched.
    """
    final = run_directory / "checkpoints" / f"step-{manifest.step:07d}"
    try:
        _publish(final, manifest, rank, barrier, write)
        if rank == 0:
            for old in checkpoints(run_directory)[:-keep]:
                _remove(old)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in TORCH_WRITERS):
            raise
        reason = " ".join(str(error).splitlines()[0].split())
        raise CheckpointError(
            f"{final} cannot be written ({reason}); {shutil.disk_usage(run_directory).free:,} bytes are free there: "
            "make room, and start the job again: it goes on from the checkpoint before"
        ) from error
    barrier()
    return final


def _publish(final: Path, manifest: Manifest, rank: int, barrier: Callable[[], None], write: Callable[[Path], None]) -> None:
    partial = final.with_name(final.name + ".partial")
    if rank == 0:
        for leftover in final.parent.glob("*.partial"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
    barrier()
    write(partial)
    barrier()
    if rank == 0:
        _seal(partial, manifest)
        if final.exists():
            shutil.rmtree(final)
        os.rename(partial, final)
        _sync(final.parent)


def _seal(partial: Path, manifest: Manifest) -> None:
    """Writes the manifest after everything else is on disk."""
    sizes = {}
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            _sync(path)
            sizes[str(path.relative_to(partial))] = path.stat().st_size
    (partial / MANIFEST).write_text(json.dumps(dataclasses.asdict(dataclasses.replace(manifest, file_bytes=sizes)), indent=1))
    _sync(partial / MANIFEST)
    _sync(partial)


def _remove(checkpoint: Path) -> None:
    """Takes the name away first, so that a half-removed checkpoint is never taken for a whole one."""
    doomed = checkpoint.with_name(checkpoint.name + ".partial")
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_weights(checkpoint: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A checkpoint's model and its full fp32 weights by MTPModel's parameter names, gathered from all ranks' shards.

    Raises:
        CheckpointError: as read_manifest.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    manifest = read_manifest(checkpoint)
    if manifest.engine_kind == "zero3":
        weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="engine")
    else:
        stages = [_weights_of_stage(file) for file in sorted((checkpoint / "engine").glob("mp_rank_*_model_states.pt"))]
        weights = {name: weight for stage in stages for name, weight in stage.items()}
        if len(weights[UNEMBEDDING]) < manifest.model["vocab_size"]:  # each stage has some of its rows, in order
            weights[UNEMBEDDING] = torch.cat([stage[UNEMBEDDING] for stage in stages if UNEMBEDDING in stage])
    return ModelConfig(**manifest.model), {name: weight.contiguous() for name, weight in weights.items()}


def _weights_of_stage(file: Path) -> dict[str, Tensor]:
    """The fp32 weights of one pipeline stage, or of all under ZeRO-1, from the optimizer states beside `file`.

    DeepSpeed's own reader knows neither several stages nor BF16_Optimizer. Each group of parameters is one row of numbers, cut into
    a part for each rank; the last part may be padded. Source: deepspeed/utils/zero_to_fp32.py, _zero2_merge_trainable_params.
    """
    shapes = torch.load(file, map_location="cpu", mmap=True, weights_only=False)["param_shapes"]
    stage, parts = file.name.removesuffix("_model_states.pt"), []
    for rank in itertools.count():
        found = list(file.parent.glob(f"*zero_pp_rank_{rank}_{stage}_optim_states.pt"))
        if not found:
            break
        state = torch.load(found[0], map_location="cpu", mmap=True, weights_only=False)
        parts.append(state["optimizer_state_dict"]["single_partition_of_fp32_groups"])
    weights = {}
    for group, shapes_of_group in enumerate(shapes):
        row, start = torch.cat([part[group] for part in parts]), 0
        for name, shape in shapes_of_group.items():
            weights[name] = row[start : start + shape.numel()].view(shape)
            start += shape.numel()
    return weights
