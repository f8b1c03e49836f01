"""Raw text -> documents: text files, source trees, JSON lines and Parquet, in an order that does not depend on the file system."""

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NoReturn

from megamtp.data.records import JSON, TEXT, Span, content_suffix, kind, read
from megamtp.errors import InputError

TEXT_SUFFIXES = frozenset(
    ".c .cc .cpp .cs .css .cu .go .h .hpp .html .java .js .jl .kt .lua .md .php .pl .py .pyi .r .rb .rs .rst .scala .sh .sql "
    ".swift .tex .toml .ts .txt .yaml .yml".split()
)
STANDARD_LIBRARY_EXCLUDED = ("test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__")
# Inputs with fewer documents than this are cut into pieces, so that some can be held out for validation.
FEW_DOCUMENTS = 40
PIECE_CHARACTERS = 16 * 1024


@dataclass
class Source:
    """Where documents come from.

    Attributes:
        files: sorted files, each with the name that identifies it whatever folder it lies in.
        json_key: of a JSON line or Parquet column that holds the text.
        unreadable: names of files that were passed over because they are not UTF-8; filled while reading.
    """

    files: list[tuple[str, Path]]
    json_key: str = "text"
    unreadable: list[str] = field(default_factory=list)

    def documents(self) -> Iterator[tuple[str, str]]:
        """(name, text) of every document that is not empty. Raises InputError as records.read does."""
        self.unreadable.clear()
        for name, path in self.files:
            yield from read(Span(name, path), self.json_key, self.unreadable)

    def is_small(self) -> bool:
        """Whether documents are to be cut in pieces: there are fewer than FEW_DOCUMENTS. Reads no more than that number."""
        return sum(1 for _ in islice(self.documents(), FEW_DOCUMENTS)) < FEW_DOCUMENTS

    def duplicates(self) -> list[tuple[str, ...]]:
        """For each file the names of the documents whose text an earlier one has. All texts are in memory: for few documents."""
        seen: set[str] = set()
        found = []
        for name, path in self.files:
            names = []
            for document, text in read(Span(name, path), self.json_key, []):
                if text in seen:
                    names.append(document)
                seen.add(text)
            found.append(tuple(names))
        return found

    def pieces(self) -> Iterator[tuple[str, str]]:
        """The documents, or if they are few their pieces."""
        small = self.is_small()
        for name, text in self.documents():
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


def find_source(inputs: list[Path], exclude: tuple[str, ...] = (), json_key: str = "text") -> Source:
    """All text files of the inputs: any file that is named; of folders, those with a suffix of text, source, JSON lines or Parquet,
    but not .json, which is taken for JSON lines only where it is named or compressed.

    Args:
        exclude: names of files or folders to leave out, wherever they lie.

    Raises:
        InputError: an input does not exist, a folder cannot be read, or there is no file at all.
    """
    try:
        files = [(_name(relative), path) for given in inputs for relative, path in _find(given, exclude)]
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; expected files that can be read: mend it or leave it out") from None
    if not files:
        where = ", ".join(map(str, inputs))
        raise InputError(f"no text files in {where}; expected such as *.py, *.txt, *.jsonl, *.parquet, or *.json by their names")
    return Source(sorted(files), json_key)


def _find(given: Path, exclude: tuple[str, ...]) -> Iterator[tuple[Path, Path]]:
    """(path below the folder `given`, path) of each text file; for a file `given`, its name and itself."""
    if given.is_dir():
        for folder, subfolders, names in os.walk(given, onerror=_refuse):
            subfolders[:] = [name for name in subfolders if name not in exclude]
            for path in (Path(folder, name) for name in names if name not in exclude):
                if _is_sought(path) and path.is_file():
                    yield path.relative_to(given), path
    elif not given.is_file():
        found = "is neither a file nor a folder" if given.exists() else "does not exist"
        raise InputError(f"{given} {found}; expected a text file, a .jsonl or .parquet file, or a folder")
    elif given.name not in exclude:
        yield Path(given.name), given


def _is_sought(path: Path) -> bool:
    """Of a folder's files. A .json file among them may be a program's settings, unless it is compressed."""
    if path.suffix.lower() == JSON:
        return False
    return kind(path) != TEXT or content_suffix(path) in TEXT_SUFFIXES


def _refuse(error: OSError) -> NoReturn:
    raise error


def standard_library() -> Source:
    """The Python sources of the running interpreter's standard library, without its tests and installed packages."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = find_source([folder], STANDARD_LIBRARY_EXCLUDED)
    return Source([(name, path) for name, path in found.files if path.suffix == ".py"])


def _name(path: Path) -> str:
    """The path as text that can be encoded and printed, even if the file system's name is not UTF-8."""
    return path.as_posix().encode(errors="backslashreplace").decode()
