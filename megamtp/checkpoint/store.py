"""Where checkpoints lie and when they count: RUN/checkpoints/step-0000100, with a manifest that is written last.

A checkpoint is written as step-0000100.partial and renamed when all ranks have finished, so what bears the final name
is whole. The manifest has the size and the checksum of every file, and of itself, so that what has been damaged since
is noticed.
"""

import dataclasses
import json
import os
import re
import shutil
import typing
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamtp import __version__
from megamtp.checkpoint.contents import written_out
from megamtp.checkpoint.folder import check_sizes
from megamtp.checkpoint.shards import WrittenFile, read_crc32
from megamtp.config import ModelConfig
from megamtp.errors import CheckpointError
from megamtp.files import exchange, fsync

MANIFEST = "manifest.json"
FORMAT = 2  # 1 was DeepSpeed's own files
NAME = re.compile(r"step-(\d{7,})")
PARTIAL = ".partial"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is of.

    Attributes:
        step: optimizer steps taken, with skipped ones.
        world_size, engine_kind, precision: of the job that wrote it. Any other job can read it.
        model: ModelConfig's fields.
        state: the rest of an engine's state, as Engine.state has it.
        files: {"bytes", "crc32"} of every file, by path relative to the checkpoint.
    """

    step: int
    world_size: int
    engine_kind: str
    precision: str
    model: dict[str, Any]
    state: dict[str, Any] = dataclasses.field(default_factory=dict)
    files: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT
    code_version: str = __version__

    @property
    def file_bytes(self) -> int:
        """The size of all files together."""
        return sum(file["bytes"] for file in self.files.values())


def folder_of(run_directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or will be."""
    return run_directory / "checkpoints" / f"step-{step:07d}"


def partial_of(checkpoint: Path) -> Path:
    """Where it is until it is whole."""
    return checkpoint.with_name(checkpoint.name + PARTIAL)


def checkpoints(run_directory: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = run_directory / "checkpoints"
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if os.path.isdir(folder) else []
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def newest_checkpoint(run_directory: Path) -> Path:
    """Raises: CheckpointError if there is none."""
    found = checkpoints(run_directory)
    if not found:
        raise CheckpointError(
            f"{run_directory} holds no checkpoint; expected {run_directory}/checkpoints/step-*: train there first"
        )
    return found[-1]


def read_manifest(checkpoint: Path, check_files: bool = True) -> Manifest:
    """The manifest, after checking that every file is there in its full size.

    Args:
        check_files: False leaves the files alone, for ranks of which others look at them: a thousand ranks that look at
            a thousand files each are a burden to any file system.

    Raises:
        CheckpointError: something is missing, cut short, unreadable, or of another format. What to do about damage,
            which its message leaves out, depends on whether there are other checkpoints.
    """
    path = checkpoint / MANIFEST
    try:
        content = json.loads(path.read_text())
        _check_format(path, content)
        crc = content.pop("crc32")
        if crc != _crc32(content):
            raise ValueError(f"its checksum is {_crc32(content):08x}, expected {crc:08x}")
        manifest = Manifest(**content)
        for name, hint in typing.get_type_hints(Manifest).items():
            kind, value = typing.get_origin(hint) or hint, getattr(manifest, name)
            if not isinstance(value, kind):
                raise TypeError(f"{name} is {value!r}, not of type {kind.__name__}")
        sizes = {name: file["bytes"] for name, file in manifest.files.items()}
        if check_files:
            check_sizes(checkpoint, sizes, remedy=None)
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint} is not a checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read ({error})") from None
    return manifest


class FormatError(CheckpointError):
    """A checkpoint of another version of this program: whole, but not ours to read, and not ours to pass over."""


def _check_format(path: Path, content: dict[str, Any]) -> None:
    found = content.get("format_version", 1)
    if found != FORMAT and isinstance(found, int):
        remedy = "read it with the megamtp that wrote it" if found < FORMAT else "install a newer megamtp"
        raise FormatError(
            f"{path} is of format {found}, written by megamtp {content.get('code_version', 'before 0.1.0')}; "
            f"expected format {FORMAT} (this is megamtp {__version__}): {remedy}, or choose another folder"
        )


def _crc32(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def damage(checkpoint: Path, manifest: Manifest, share: int = 0, shares: int = 1) -> str | None:
    """The first thing in a checkpoint's files that is not as the manifest says; None if all verify. Reads every byte.

    Args:
        share, shares: looks at every `shares`-th file only, for ranks that read together.
    """
    for name in sorted(manifest.files)[share::shares]:
        file, expected = checkpoint / name, manifest.files[name]["crc32"]
        try:
            found = read_crc32(file)
        except OSError as error:
            return f"{file} cannot be read: {error.strerror}"
        if found != expected:
            return f"{file} has the checksum {found:08x}, expected {expected:08x}"
    return None


def check_trained_model(checkpoint: Path, manifest: Manifest, model: ModelConfig) -> None:
    """Raises: CheckpointError if the checkpoint is of another model."""
    found = dataclasses.asdict(written_out(ModelConfig(**manifest.model)))
    for name, setting in dataclasses.asdict(written_out(model)).items():
        if found[name] != setting:
            raise CheckpointError(
                f"{checkpoint} is of another model: model.{name}={found[name]}, expected {setting}; "
                "change the configuration or run.directory"
            )


def publish(checkpoint: Path, manifest: Manifest, files: dict[str, WrittenFile]) -> None:
    """Makes what lies in partial_of(checkpoint) visible in one step, replacing what had the name. One rank alone.

    Args:
        files: all that were written there, each already on disk.

    Raises:
        OSError: as when the disk is full.
        CheckpointError: a file is not there in its size, as when nodes have a folder of this name each.
    """
    partial = partial_of(checkpoint)
    check_sizes(
        partial,
        {name: file.bytes for name, file in files.items()},
        remedy="let all nodes share run.directory, and no other job",
    )
    content = dataclasses.asdict(manifest) | {"files": {name: dataclasses.asdict(file) for name, file in files.items()}}
    (partial / MANIFEST).write_text(json.dumps(content | {"crc32": _crc32(content)}, indent=1))
    fsync(partial / MANIFEST)
    fsync(partial)
    if replaces := checkpoint.exists():
        exchange(partial, checkpoint, _aside(checkpoint))
    else:
        os.rename(partial, checkpoint)
    for folder in checkpoint.parents[:2]:  # checkpoints/ may be new, too
        fsync(folder)
    if replaces:
        shutil.rmtree(partial, ignore_errors=True)  # what remains of it goes with the leftovers


def outdated(run_directory: Path, step: int, keep: int, keep_every_steps: int | None) -> list[Path]:
    """The checkpoints to remove once that of `step` is there: older than the newest `keep`, and at no multiple of
    the period.
    """
    older = [path for path in checkpoints(run_directory) if _step(path) <= step][:-keep]
    return [path for path in older if not keep_every_steps or _step(path) % keep_every_steps]


def remove(checkpoint: Path) -> None:
    """Takes the name away first, so that a half-removed checkpoint is never taken for a whole one. Raises OSError."""
    aside = _aside(checkpoint)
    os.rename(checkpoint, aside)
    shutil.rmtree(aside)


def _aside(checkpoint: Path) -> Path:
    """A free name for what is no checkpoint any more."""
    aside = checkpoint.with_name(f"{checkpoint.name}.removed{PARTIAL}")
    shutil.rmtree(aside, ignore_errors=True)
    return aside


def remove_leftovers(run_directory: Path) -> list[Path]:
    """Removes what jobs that were killed while they saved or removed have left, and returns what cannot be removed."""
    leftovers = list((run_directory / "checkpoints").glob(f"*{PARTIAL}"))
    for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True)
    return [leftover for leftover in leftovers if leftover.exists()]


def verified(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint of which every byte has been checked.

    Raises:
        CheckpointError: something is damaged.
    """
    try:
        manifest = read_manifest(checkpoint)
        found = damage(checkpoint, manifest)
    except FormatError:
        raise
    except CheckpointError as error:
        found = str(error)
    if found:
        has_older = any(_step(other) < _step(checkpoint) for other in checkpoints(checkpoint.parent.parent))
        remedy = (
            f"remove {checkpoint} to resume from an older one"
            if has_older
            else "restore it, or train in another run.directory"
        )
        raise CheckpointError(f"{found}; {remedy}")
    return manifest
