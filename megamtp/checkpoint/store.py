"""The folders of checkpoints, RUN/checkpoints/step-0000100: publishing, reading, verifying and removing them.

A checkpoint is written to step-0000100.partial, and renamed when all ranks have finished, so a folder with the final
name is complete. The manifest is written last. It holds the size and the checksum of every file and its own checksum,
so that later damage is detected.
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
from megamtp.checkpoint.contents import resolve_defaults
from megamtp.checkpoint.folder import check_sizes
from megamtp.checkpoint.shards import WrittenFile, read_crc32
from megamtp.config import ModelConfig
from megamtp.errors import CheckpointError
from megamtp.files import exchange, fsync

MANIFEST = "manifest.json"
FORMAT = 2  # format 1 consisted of DeepSpeed's files
NAME = re.compile(r"step-(\d{7,})")
PARTIAL = ".partial"


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
        step: optimizer steps taken, including skipped steps.
        world_size, engine_kind, precision: of the job that wrote the checkpoint. Any other job can read it.
        model: the fields of ModelConfig.
        state: the state besides tensors, see RunState.to_json.
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
        """The total size of all files."""
        return sum(file["bytes"] for file in self.files.values())


def checkpoint_path(run_directory: Path, step: int) -> Path:
    """Returns the final path of the checkpoint of a step."""
    return run_directory / "checkpoints" / f"step-{step:07d}"


def partial_path(checkpoint: Path) -> Path:
    """Returns the path to which a checkpoint is written before it is published."""
    return checkpoint.with_name(checkpoint.name + PARTIAL)


def checkpoints(run_directory: Path) -> list[Path]:
    """Returns the complete checkpoints of a run, oldest first."""
    folder = run_directory / "checkpoints"
    complete = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if os.path.isdir(folder) else []
    return sorted(complete, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def newest_checkpoint(run_directory: Path) -> Path:
    """Returns the complete checkpoint of the highest step. Raises CheckpointError if no checkpoint is complete."""
    complete = checkpoints(run_directory)
    if not complete:
        raise CheckpointError(
            f"{run_directory} holds no checkpoint; expected {run_directory}/checkpoints/step-*: train there first"
        )
    return complete[-1]


def read_manifest(checkpoint: Path, check_files: bool = True) -> Manifest:
    """Returns the manifest, after checking that every file exists and has the right size.

    Args:
        check_files: False skips that check. On large jobs only some ranks check files, because a thousand ranks that
            each look up a thousand files would overload the file system.

    Raises:
        CheckpointError: something is missing, truncated, unreadable, or of another format. The message has no remedy,
            because the remedy depends on whether there are other checkpoints.
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
    """A checkpoint of another version of megamtp. It is not damaged, so it must not be skipped or overwritten."""


def _check_format(path: Path, content: dict[str, Any]) -> None:
    version = content.get("format_version", 1)
    if version != FORMAT and isinstance(version, int):
        remedy = "read it with the megamtp that wrote it" if version < FORMAT else "install a newer megamtp"
        raise FormatError(
            f"{path} is of format {version}, written by megamtp {content.get('code_version', 'before 0.1.0')}; "
            f"expected format {FORMAT} (this is megamtp {__version__}): {remedy}, or choose another folder"
        )


def _crc32(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def find_damage(checkpoint: Path, manifest: Manifest, share: int = 0, shares: int = 1) -> str | None:
    """Compares the checksums of files with the manifest. Returns a message for the first damaged file, or None.

    Args:
        share, shares: checks only every `shares`-th file, starting with number `share`, so that ranks can divide the
            files among them.
    """
    for name in sorted(manifest.files)[share::shares]:
        file, expected = checkpoint / name, manifest.files[name]["crc32"]
        try:
            crc32 = read_crc32(file)
        except OSError as error:
            return f"{file} cannot be read: {error.strerror}"
        if crc32 != expected:
            return f"{file} has the checksum {crc32:08x}, expected {expected:08x}"
    return None


def check_trained_model(checkpoint: Path, manifest: Manifest, model: ModelConfig) -> None:
    """Raises CheckpointError if the checkpoint belongs to another model."""
    saved = dataclasses.asdict(resolve_defaults(ModelConfig(**manifest.model)))
    for name, setting in dataclasses.asdict(resolve_defaults(model)).items():
        if saved[name] != setting:
            raise CheckpointError(
                f"{checkpoint} is of another model: model.{name}={saved[name]}, expected {setting}; "
                "change the configuration or run.directory"
            )


def publish(checkpoint: Path, manifest: Manifest, files: dict[str, WrittenFile]) -> None:
    """Writes the manifest and renames partial_path(checkpoint) to `checkpoint`, atomically. Only one rank calls it.

    Replaces an existing checkpoint of this name.

    Args:
        files: all files of the checkpoint, which must be on disk.

    Raises:
        OSError: the manifest cannot be written, for example because the disk is full.
        CheckpointError: a file is missing or truncated, for example because the nodes do not share run.directory.
    """
    partial = partial_path(checkpoint)
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
        exchange(partial, checkpoint, _removal_path(checkpoint))
    else:
        os.rename(partial, checkpoint)
    for folder in checkpoint.parents[:2]:  # checkpoints/ may be new, too
        fsync(folder)
    if replaces:
        shutil.rmtree(partial, ignore_errors=True)  # remove_leftovers removes the rest


def find_outdated(run_directory: Path, step: int, keep: int, keep_every_steps: int | None) -> list[Path]:
    """Returns the checkpoints to remove after that of `step` has been saved.

    Of the checkpoints up to `step`, keeps the newest `keep` and those whose steps are multiples of `keep_every_steps`.
    """
    older = [path for path in checkpoints(run_directory) if _step(path) <= step][:-keep]
    return [path for path in older if not keep_every_steps or _step(path) % keep_every_steps]


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint. Renames it first, so that it never looks complete while it is removed. Raises OSError."""
    renamed = _removal_path(checkpoint)
    os.rename(checkpoint, renamed)
    shutil.rmtree(renamed)


def _removal_path(checkpoint: Path) -> Path:
    """Returns an unused path to which a checkpoint is renamed before it is removed."""
    path = checkpoint.with_name(f"{checkpoint.name}.removed{PARTIAL}")
    shutil.rmtree(path, ignore_errors=True)
    return path


def remove_leftovers(run_directory: Path) -> list[Path]:
    """Removes partial checkpoints of jobs that were killed. Returns the paths that cannot be removed."""
    leftovers = list((run_directory / "checkpoints").glob(f"*{PARTIAL}"))
    for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True)
    return [leftover for leftover in leftovers if leftover.exists()]


def verify(checkpoint: Path) -> Manifest:
    """Checks every byte of a checkpoint, and returns its manifest.

    Raises:
        CheckpointError: something is missing or damaged.
    """
    try:
        manifest = read_manifest(checkpoint)
        damage = find_damage(checkpoint, manifest)
    except FormatError:
        raise
    except CheckpointError as error:
        damage = str(error)
    if damage:
        has_older = any(_step(other) < _step(checkpoint) for other in checkpoints(checkpoint.parent.parent))
        remedy = (
            f"remove {checkpoint} to resume from an older one"
            if has_older
            else "restore it, or train in another run.directory"
        )
        raise CheckpointError(f"{damage}; {remedy}")
    return manifest
