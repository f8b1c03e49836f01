"""Finds input files (text, source trees, JSON lines, Parquet), in an order that does not depend on the file system."""

import os
import stat
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import NoReturn

from megamtp.data.records import FORMATS, TEXT, Reader, Span, detect_format
from megamtp.errors import InputError

STANDARD_LIBRARY_EXCLUDED = ("test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__")
# Inputs with fewer documents are cut into pieces, so that some pieces can be held out for validation.
FEW_DOCUMENTS = 40
PIECE_CHARACTERS = 16 * 1024
# Reasons for passing over the contents of folders.
BINARY, HIDDEN, EXCLUDED = (
    "binary or UTF-16 files",
    "hidden files and folders",
    "files and folders that --exclude names",
)
LINKS, SPECIAL = "links to folders", "sockets, pipes and devices"


@dataclass
class Source:
    """The input files.

    Attributes:
        files: whole files, sorted by name.
        json_key: the key of a JSON line, or the Parquet column, that holds the text.
        skip_bad_records: skip JSON lines and Parquet rows without a valid text, instead of raising an error.
        passed_over: sorted names of files and folders that are not read, by reason.
    """

    files: list[Span]
    json_key: str = "text"
    skip_bad_records: bool = False
    passed_over: dict[str, list[str]] = field(default_factory=dict)

    def reader(self) -> Reader:
        """Returns a new reader for the files."""
        return Reader(self.json_key, self.skip_bad_records)

    def documents(self, reader: Reader | None = None) -> Iterator[tuple[str, str]]:
        """Yields (name, text) of every document that is not empty. Raises InputError: see Reader.documents."""
        reader = reader or self.reader()
        for file in self.files:
            yield from reader.documents(file)

    def has_few_documents(self) -> bool:
        """Returns whether there are fewer than FEW_DOCUMENTS documents. Reads at most that many."""
        return sum(1 for _ in islice(self.documents(), FEW_DOCUMENTS)) < FEW_DOCUMENTS

    def find_duplicates(self) -> list[tuple[str, ...]]:
        """Returns for each file the names of documents with the same text as an earlier document.

        Holds all texts in memory, so it is only for few documents.
        """
        seen: set[str] = set()
        duplicates, reader = [], self.reader()
        for file in self.files:
            names = []
            for document, text in reader.documents(file):
                if text in seen:
                    names.append(document)
                seen.add(text)
            duplicates.append(tuple(names))
        return duplicates

    def pieces(self, reader: Reader | None = None) -> Iterator[tuple[str, str]]:
        """Yields (name, text) of all documents, or of their pieces if there are few documents."""
        cuts_documents = self.has_few_documents()
        for name, text in self.documents(reader):
            yield from cut_into_pieces(name, text) if cuts_documents else [(name, text)]


def cut_into_pieces(name: str, text: str, first: int = 0) -> Iterator[tuple[str, str]]:
    """Yields (name, text) of a document's pieces, which end at the first line end after 16 Ki characters, or at 32 Ki.

    Args:
        first: the number of the first piece, if `text` is the rest of a document.
    """
    start, number = 0, first
    while start < len(text):
        longest = start + 2 * PIECE_CHARACTERS
        end = text.find("\n", start + PIECE_CHARACTERS - 1, longest) + 1 or longest
        yield f"{name}/{number}", text[start:end]
        start, number = end, number + 1


def find_source(
    inputs: list[Path],
    exclude: tuple[str, ...] = (),
    json_key: str = "text",
    file_format: str | None = None,
    skip_bad_records: bool = False,
    own_files: Iterable[Path] = (),
) -> Source:
    """Finds all text, JSON lines and Parquet files in the inputs, which are files and folders.

    Args:
        exclude: patterns of file and folder names to leave out, in any folder; * and ? are wildcards.
        file_format: the format of all files, one of FORMATS; None: detect the format of each file.
        own_files: paths of the output, which may lie in an input folder and are not read.

    Raises:
        InputError: an input does not exist or is binary, a folder cannot be read or has a dangling link, a file holds
            JSON records in another form than JSON lines, or there are no files.
    """
    assert file_format in (None, *FORMATS)
    passed_over: dict[str, list[str]] = defaultdict(list)
    own, files = {os.path.realpath(path) for path in own_files}, []
    for name, path, is_named in _find_all(inputs, exclude, own, passed_over):
        detected = file_format or detect_format(path, json_key, is_named)
        if detected:
            files.append(Span(name, path, detected))
        elif is_named:
            raise InputError(
                f"{path} is binary or UTF-16 (it has zero bytes); expected UTF-8 text, JSON lines or Parquet: "
                "unpack it, convert it or leave it out"
            )
        else:
            passed_over[BINARY].append(name)
    passed_over = {reason: sorted(names) for reason, names in sorted(passed_over.items())}
    if not files:
        where = ", ".join(map(str, inputs))
        skipped = "".join(f", passed over {len(names)} {reason}" for reason, names in passed_over.items())
        raise InputError(
            f"no text files in {where}{skipped}; expected UTF-8 text, JSON lines or Parquet: check --input"
        )
    return Source(files, json_key, skip_bad_records, passed_over)


def _find_all(
    inputs: list[Path], exclude: tuple[str, ...], own: set[str], passed_over: dict[str, list[str]]
) -> list[tuple[str, Path, bool]]:
    """Returns (name, path, whether the user named this file) for each file of the inputs, sorted by name."""
    files = []
    try:
        for root in inputs:
            for relative, path in _find(root, exclude, own, passed_over):
                files.append((_name(relative), path, path == root))
    except OSError as error:
        raise InputError(
            f"{error.filename}: {error.strerror}; expected files that can be read: fix it or leave it out"
        ) from None
    return sorted(files)


def _find(
    root: Path, exclude: tuple[str, ...], own: set[str], passed_over: dict[str, list[str]]
) -> Iterator[tuple[Path, Path]]:
    """Yields (path relative to the folder `root`, path) of each file. If `root` is a file: its name and path."""
    if root.is_dir():
        for path in _walk(root, exclude, own, passed_over):
            if _is_regular(path):
                yield path.relative_to(root), path
            else:
                passed_over[SPECIAL].append(_name(path.relative_to(root)))
    elif not root.is_file():
        problem = "is neither a file nor a folder" if root.exists() else "does not exist"
        raise InputError(f"{root} {problem}; expected a text file, a .jsonl or .parquet file, or a folder")
    elif _is_excluded(root.name, exclude):
        passed_over[EXCLUDED].append(_name(Path(root.name)))
    else:
        yield Path(root.name), root


def _walk(root: Path, exclude: tuple[str, ...], own: set[str], passed_over: dict[str, list[str]]) -> Iterator[Path]:
    """Yields all paths below a folder except folders, files of the output, and excluded or hidden paths.

    Adds excluded and hidden names, and links to folders, to passed_over.
    """
    own_names = {os.path.basename(path) for path in own}
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        kept = []
        for number, name in enumerate([*subfolders, *names]):
            path, is_folder = Path(folder, name), number < len(subfolders)
            if name in own_names and os.path.realpath(path) in own:
                continue
            if reason := _reason(path, is_folder, exclude):
                passed_over[reason].append(_name(path.relative_to(root)))
            elif is_folder:
                kept.append(name)
            else:
                yield path
        subfolders[:] = kept


def _reason(path: Path, is_folder: bool, exclude: tuple[str, ...]) -> str | None:
    """Returns the reason for passing over a path, or None."""
    if _is_excluded(path.name, exclude):
        return EXCLUDED
    if path.name.startswith("."):
        return HIDDEN
    return LINKS if is_folder and path.is_symlink() else None


def _is_regular(path: Path) -> bool:
    """Returns whether a path is a regular file, not a device. Raises InputError if it is a dangling link."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        raise InputError(
            f"{path} is a link to {os.readlink(path)}, which does not exist; expected complete inputs: add the missing "
            "file, remove the link, or leave it out with --exclude"
        ) from None


def _is_excluded(name: str, exclude: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in exclude)


def _raise(error: OSError) -> NoReturn:
    raise error


def standard_library() -> Source:
    """Returns the Python files of the running interpreter's standard library, without tests and installed packages."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = _walk(folder, STANDARD_LIBRARY_EXCLUDED, set(), defaultdict(list))
    files = [
        Span(_name(path.relative_to(folder)), path, TEXT) for path in paths if path.suffix == ".py" and path.is_file()
    ]
    return Source(sorted(files, key=lambda file: file.name))


def _name(path: Path) -> str:
    """Returns the path as text that can be printed, even if it is not valid UTF-8."""
    return path.as_posix().encode(errors="backslashreplace").decode()
