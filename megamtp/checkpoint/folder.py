"""Folders that are whole or not there: how a conversion's result gets its name."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megamtp.errors import CheckpointError
from megamtp.files import exchange, fsync, take_lock

LONGEST_NAME_BYTES = 255  # of a file, on the file systems of Linux
OLD = "old"  # a replaced export, in the folder of the conversion that replaces it
EXPORT_LIST = "megamtp_export.json"  # names the files of an export of ours: only such a folder is ever replaced


@contextlib.contextmanager
def published(directory: Path, num_bytes: int, replaceable: bool = False) -> Iterator[Path]:
    """A new folder beside `directory` to write into; it takes that name when the block ends, all of it on disk.

    Args:
        num_bytes: how much will be written, for which there must be room.
        replaceable: a later export may replace it.

    Raises:
        CheckpointError: the destination holds something else or cannot be written, or there is not enough room.
    """
    check_destination(directory)
    directory = directory.resolve()
    work = directory.with_name(f".{directory.name}.partial")
    try:
        leftovers = [path for path in work.rglob("*") if path.is_file()]  # of a killed conversion; they will be removed
        left_bytes = sum(path.stat().st_size for path in leftovers)
        check_space(directory, num_bytes - left_bytes)
        with _made_alone(work, directory):
            new, old = work / "new", work / OLD
            new.mkdir()
            yield new
            if replaceable:
                names = (str(path.relative_to(new)) for path in new.rglob("*"))
                write_json(new / EXPORT_LIST, sorted([EXPORT_LIST, *names]))
            for path in [*new.rglob("*"), new]:
                fsync(path)
            check_destination(directory)  # again: much may have come there since
            if directory.exists():
                exchange(new, directory, old)
            else:
                os.rename(new, directory)
            fsync(directory.parent)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error}; choose another destination") from None


@contextlib.contextmanager
def _made_alone(work: Path, directory: Path) -> Iterator[None]:
    """A folder that this process alone has, empty at first but for a lock, and gone at the end.

    If a conversion was killed just when it had set aside what was in `directory`, that gets its name back.
    """
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "wb") as stream:
        if not take_lock(stream, work, "make sure that no other process writes to it"):
            raise CheckpointError(f"another process writes to {work}; expected one at a time: wait for it, or end it")
        if (work / OLD).exists() and not directory.exists():
            os.rename(work / OLD, directory)
        for leftover in set(work.iterdir()) - {work / "lock"}:
            shutil.rmtree(leftover)
        try:
            yield
        finally:
            shutil.rmtree(work)


def check_destination(directory: Path) -> None:
    """Raises: CheckpointError if a folder cannot take that name, or would destroy something else than an earlier
    export.
    """
    try:
        status = directory.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error.strerror}; choose another destination") from None
    if os.path.samestat(status, os.stat(".")):
        raise CheckpointError(
            f"{directory} is the current folder, which would be replaced by a new one; expected another: choose a new "
            "folder in it"
        )
    if os.path.ismount(directory):
        raise CheckpointError(
            f"{directory} is a mount point, which keeps its place; expected a folder: choose one in it"
        )
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; expected a new or empty folder: choose another destination")
    found = sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))
    if found and found != _listed(directory):
        raise CheckpointError(
            f"{directory} holds other files than an earlier export ({found[0]}, ...); expected a new or empty folder: "
            "choose another destination"
        )


def check_space(directory: Path, num_bytes: int) -> None:
    """Raises: CheckpointError if the disk of `directory`, which need not exist, has less room."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise CheckpointError(
            f"{directory} needs {num_bytes:,} bytes, {free:,} are free there; make room, or choose another destination"
        )


def check_sizes(folder: Path, sizes: Mapping[str, int], remedy: str | None) -> None:
    """Raises: CheckpointError if a file, by its path in `folder`, is missing or not of its size in bytes."""
    for name, size in sizes.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(f"{file} {state}, expected {size} bytes{f'; {remedy}' if remedy else ''}")


def name_in(file: Path) -> str:
    """The name of a neighbour, which is all that a text file holds. Raises: CheckpointError if no file can have that
    name.
    """
    try:
        name = file.read_text().strip()
        if Path(name).name != name or "\0" in name or len(os.fsencode(name)) > LONGEST_NAME_BYTES:
            raise ValueError(f"{name[:50]!r} cannot be a file's name")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}); expected the name of a folder beside it: copy it again"
        ) from None
    return name


def write_json(path: Path, content: Any) -> None:
    """Raises OSError."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _listed(directory: Path) -> list[str] | None:
    try:
        return json.loads((directory / EXPORT_LIST).read_text())
    except (OSError, ValueError):
        return None
