"""Raw text -> documents: text files, source trees, JSON lines and Parquet, in an order that does not depend on the
file system.
"""

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

from megamtp.data.records import FORMATS, TEXT, Reader, Span, recognise
from megamtp.errors import InputError

STANDARD_LIBRARY_EXCLUDED = ("test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__")
# Inputs with fewer documents than this are cut into pieces, so that some can be held out for validation.
FEW_DOCUMENTS = 40
PIECE_CHARACTERS = 16 * 1024
# What is passed over in folders.
BINARY, HIDDEN, EXCLUDED = (
    "binary or UTF-16 files",
    "hidden files and folders",
    "files and folders that --exclude names",
)
LINKS, SPECIAL = "links to folders", "sockets, pipes and devices"


@dataclass
class Source:
    """Where documents come from.

    Attributes:
        files: sorted whole files, each with the name that identifies it whatever folder it lies in.
        json_key: of a JSON line or Parquet column that holds the text.
        skip_bad_records: pass over JSON lines and Parquet rows without a text, instead of refusing them.
        passed_over: sorted names of what else was found, by the reason.
    """

    files: list[Span]
    json_key: str = "text"
    skip_bad_records: bool = False
    passed_over: dict[str, list[str]] = field(default_factory=dict)

    def reader(self) -> Reader:
        """A reader of the files that has passed over nothing yet."""
        return Reader(self.json_key, self.skip_bad_records)

    def documents(self, reader: Reader | None = None) -> Iterator[tuple[str, str]]:
        """(name, text) of every document that is not empty. Raises InputError as Reader.documents does."""
        reader = reader or self.reader()
        for file in self.files:
            yield from reader.documents(file)

    def is_small(self) -> bool:
        """Whether documents are to be cut in pieces: there are fewer than FEW_DOCUMENTS. Reads no more than that
        number.
        """
        return sum(1 for _ in islice(self.documents(), FEW_DOCUMENTS)) < FEW_DOCUMENTS

    def duplicates(self) -> list[tuple[str, ...]]:
        """For each file the names of the documents whose text an earlier one has. All texts are in memory: for few
        documents.
        """
        seen: set[str] = set()
        found, reader = [], self.reader()
        for file in self.files:
            names = []
            for document, text in reader.documents(file):
                if text in seen:
                    names.append(document)
                seen.add(text)
            found.append(tuple(names))
        return found

    def pieces(self, reader: Reader | None = None) -> Iterator[tuple[str, str]]:
        """The documents, or if they are few their pieces."""
        small = self.is_small()
        for name, text in self.documents(reader):
            yield from cut(name, text) if small else [(name, text)]


def cut(name: str, text: str, first: int = 0) -> Iterator[tuple[str, str]]:
    """(name, text) of a document's pieces, which end at the first line end after 16 Ki characters, or at 32 Ki.

    Args:
        first: number of the first of them, if `text` is the rest of a document from there on.
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
    """All files of the inputs that are text, JSON lines or Parquet.

    Args:
        exclude: names of files or folders to leave out, wherever they lie; * and ? stand for other characters.
        file_format: of all files, one of FORMATS; None: each file's is recognised.
        own_files: of the output, which may lie in an input folder.

    Raises:
        InputError: an input does not exist or is binary, a folder has a link that points nowhere or cannot be read, a
            file holds JSON records in another form than JSON lines, or there is no file at all.
    """
    assert file_format in (None, *FORMATS)
    passed_over: dict[str, list[str]] = defaultdict(list)
    own, files = {os.path.realpath(path) for path in own_files}, []
    for name, path, is_named in _find_all(inputs, exclude, own, passed_over):
        recognised = file_format or recognise(path, json_key, is_named)
        if recognised:
            files.append(Span(name, path, recognised))
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
    """(name, path, whether the user named this file) of each file of the inputs, sorted by name."""
    files = []
    try:
        for given in inputs:
            found = _find(given, exclude, own, passed_over)
            files += [(_name(relative), path, path == given) for relative, path in found]
    except OSError as error:
        raise InputError(
            f"{error.filename}: {error.strerror}; expected files that can be read: mend it or leave it out"
        ) from None
    return sorted(files)


def _find(
    given: Path, exclude: tuple[str, ...], own: set[str], passed_over: dict[str, list[str]]
) -> Iterator[tuple[Path, Path]]:
    """(path below the folder `given`, path) of each file; for a file `given`, its name and itself."""
    if given.is_dir():
        for path in _walk(given, exclude, own, passed_over):
            if _is_regular(path):
                yield path.relative_to(given), path
            else:
                passed_over[SPECIAL].append(_name(path.relative_to(given)))
    elif not given.is_file():
        found = "is neither a file nor a folder" if given.exists() else "does not exist"
        raise InputError(f"{given} {found}; expected a text file, a .jsonl or .parquet file, or a folder")
    elif _is_excluded(given.name, exclude):
        passed_over[EXCLUDED].append(_name(Path(given.name)))
    else:
        yield Path(given.name), given


def _walk(given: Path, exclude: tuple[str, ...], own: set[str], passed_over: dict[str, list[str]]) -> Iterator[Path]:
    """Whatever lies below a folder and is no folder, without what is the output's own, excluded or hidden; fills
    passed_over.
    """
    own_names = {os.path.basename(path) for path in own}
    for folder, subfolders, names in os.walk(given, onerror=_refuse):
        kept = []
        for number, name in enumerate([*subfolders, *names]):
            path, is_folder = Path(folder, name), number < len(subfolders)
            if name in own_names and os.path.realpath(path) in own:
                continue
            if reason := _reason(path, is_folder, exclude):
                passed_over[reason].append(_name(path.relative_to(given)))
            elif is_folder:
                kept.append(name)
            else:
                yield path
        subfolders[:] = kept


def _reason(path: Path, is_folder: bool, exclude: tuple[str, ...]) -> str | None:
    """Why a path in a folder is passed over, if it is."""
    if _is_excluded(path.name, exclude):
        return EXCLUDED
    if path.name.startswith("."):
        return HIDDEN
    return LINKS if is_folder and path.is_symlink() else None


def _is_regular(path: Path) -> bool:
    """Whether it is a file, not a device. Raises InputError: it is a link that points nowhere."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        raise InputError(
            f"{path} is a link to {os.readlink(path)}, which does not exist; expected whole inputs: fetch what is "
            "missing, remove the link, or leave it out with --exclude"
        ) from None


def _is_excluded(name: str, exclude: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in exclude)


def _refuse(error: OSError) -> NoReturn:
    raise error


def standard_library() -> Source:
    """The Python sources of the running interpreter's standard library, without its tests and installed packages."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = _walk(folder, STANDARD_LIBRARY_EXCLUDED, set(), defaultdict(list))
    files = [
        Span(_name(path.relative_to(folder)), path, TEXT) for path in found if path.suffix == ".py" and path.is_file()
    ]
    return Source(sorted(files, key=lambda file: file.name))


def _name(path: Path) -> str:
    """The path as text that can be encoded and printed, even if the file system's name is not UTF-8."""
    return path.as_posix().encode(errors="backslashreplace").decode()
