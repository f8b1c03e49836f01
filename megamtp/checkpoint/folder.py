"""Atomic creation of folders, for the results of conversions."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megamtp.errors import CheckpointError
from megamtp.files import exchange, fsync, take_lock

LONGEST_NAME_BYTES = 255  # longest file name on Linux file systems
OLD = "old"  # the export that is being replaced, in the work folder
EXPORT_LIST = "megamtp_export.json"  # lists the files of an export; only folders with such a list are ever replaced


@contextlib.contextmanager
def atomic_folder(directory: Path, num_bytes: int, replaceable: bool = False) -> Iterator[Path]:
    """Yields a new folder to write into, and renames it to `directory` when the block ends and all files are on disk.

    Args:
        num_bytes: the size of what will be written.
        replaceable: writes a list of the files, so that a later export may replace the folder.

    Raises:
        CheckpointError: the destination holds something else or cannot be written, or there is not enough space.
    """
    check_destination(directory)
    directory = directory.resolve()
    work = directory.with_name(f".{directory.name}.partial")
    try:
        # Files of a killed conversion will be removed before anything is written.
        leftovers = [path for path in work.rglob("*") if path.is_file()]
        leftover_bytes = sum(path.stat().st_size for path in leftovers)
        check_space(directory, num_bytes - leftover_bytes)
        with _locked_work_folder(work, directory):
            new, old = work / "new", work / OLD
            new.mkdir()
            yield new
            if replaceable:
                names = (str(path.relative_to(new)) for path in new.rglob("*"))
                write_json(new / EXPORT_LIST, sorted([EXPORT_LIST, *names]))
            for path in [*new.rglob("*"), new]:
                fsync(path)
            check_destination(directory)  # again, because it may have changed in the meantime
            if directory.exists():
                exchange(new, directory, old)
            else:
                os.rename(new, directory)
            fsync(directory.parent)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error}; choose another destination") from None


@contextlib.contextmanager
def _locked_work_folder(work: Path, directory: Path) -> Iterator[None]:
    """Creates and locks an empty work folder, and removes it at the end.

    If an earlier conversion was killed after it renamed the old export and before it renamed the new export, restores
    the old export.
    """
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "wb") as stream:
        if not take_lock(stream, work, "make sure that no other process writes to it"):
            raise CheckpointError(
                f"another process is writing to {work}; expected one process at a time: wait for it or end it"
            )
        if (work / OLD).exists() and not directory.exists():
            os.rename(work / OLD, directory)
        for leftover in set(work.iterdir()) - {work / "lock"}:
            shutil.rmtree(leftover)
        try:
            yield
        finally:
            shutil.rmtree(work)


def check_destination(directory: Path) -> None:
    """Raises CheckpointError if no folder can have this name, or if it is something other than an earlier export."""
    try:
        status = directory.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error.strerror}; choose another destination") from None
    if os.path.samestat(status, os.stat(".")):
        raise CheckpointError(
            f"{directory} is the current folder, which would be replaced; expected another folder: choose a new folder "
            "in it"
        )
    if os.path.ismount(directory):
        raise CheckpointError(
            f"{directory} is a mount point, which cannot be renamed; expected a folder: choose a folder in it"
        )
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; expected a new or empty folder: choose another destination")
    names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))
    if names and names != _read_export_list(directory):
        raise CheckpointError(
            f"{directory} holds other files than an earlier export ({names[0]}, ...); expected a new or empty folder: "
            "choose another destination"
        )


def check_space(directory: Path, num_bytes: int) -> None:
    """Raises CheckpointError if the disk of `directory`, which need not exist, has less free space than `num_bytes`."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.is_dir())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < num_bytes:
        raise CheckpointError(
            f"{directory} needs {num_bytes:,} bytes, but only {free_bytes:,} are free there; make room, or choose "
            "another destination"
        )


def check_sizes(folder: Path, sizes: Mapping[str, int], remedy: str | None) -> None:
    """Raises CheckpointError if a file is missing or has another size.

    Args:
        sizes: sizes in bytes, by path relative to `folder`.
        remedy: ends the message.
    """
    for name, expected in sizes.items():
        file = folder / name
        num_bytes = file.stat().st_size if file.is_file() else None
        if num_bytes != expected:
            problem = "is missing" if num_bytes is None else f"has {num_bytes} bytes"
            raise CheckpointError(f"{file} {problem}, expected {expected} bytes{f'; {remedy}' if remedy else ''}")


def read_name(file: Path) -> str:
    """Reads a text file that holds only the name of a file or folder beside it.

    Raises:
        CheckpointError: the file cannot be read, or its content cannot be a name.
    """
    try:
        name = file.read_text().strip()
        if Path(name).name != name or "\0" in name or len(os.fsencode(name)) > LONGEST_NAME_BYTES:
            raise ValueError(f"{name[:50]!r} cannot be a file name")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}); expected the name of a folder beside it: copy it again"
        ) from None
    return name


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file. Raises OSError."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_export_list(directory: Path) -> list[str] | None:
    try:
        return json.loads((directory / EXPORT_LIST).read_text())
    except (OSError, ValueError):
        return None
