"""Raw text -> documents: text files, source trees and JSONL, in an order that does not depend on the file system."""

import json
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megamtp.errors import InputError

TEXT_SUFFIXES = frozenset(
    ".c .cc .cpp .cs .css .cu .go .h .hpp .html .java .js .jl .kt .lua .md .php .pl .py .pyi .r .rb .rs .rst .scala .sh .sql "
    ".swift .tex .toml .ts .txt .yaml .yml".split()
)
STANDARD_LIBRARY_EXCLUDED = ("test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__")
# Inputs with fewer documents than this are cut into pieces, so that some can be held out for validation.
FEW_DOCUMENTS = 40
PIECE_CHARACTERS = 16 * 1024
# JSON can spell these ("\ud800"), UTF-8 cannot.
LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass
class Source:
    """Where documents come from.

    Attributes:
        files: sorted files, each with the name that identifies it whatever folder it lies in.
        json_key: the key of a JSONL line that holds its text.
        unreadable: names of files that were passed over because they are not UTF-8; filled while reading.
    """

    files: list[tuple[str, Path]]
    json_key: str = "text"
    unreadable: list[str] = field(default_factory=list)

    def documents(self) -> Iterator[tuple[str, str]]:
        """(name, text) of every document that is not empty.

        Raises:
            InputError: a file cannot be read, or a JSONL line is no object with a string under json_key.
        """
        self.unreadable.clear()
        for name, path in self.files:
            yield from self._jsonl(name, path) if path.suffix == ".jsonl" else self._text(name, path)

    def pieces(self) -> Iterator[tuple[str, str]]:
        """The documents, or if they are few their pieces, cut at the first line end after 16 Ki characters, or at 32 Ki."""
        few = sum(1 for _ in self.documents()) < FEW_DOCUMENTS
        for name, text in self.documents():
            if few:
                yield from ((f"{name}/{number}", piece) for number, piece in enumerate(_cut(text)))
            else:
                yield name, text

    def _text(self, name: str, path: Path) -> Iterator[tuple[str, str]]:
        try:
            text = path.read_bytes().decode()  # not read_text: line ends stay as they are
        except UnicodeDecodeError:
            self.unreadable.append(name)
            return
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; expected a readable file: mend it or leave it out") from None
        if text:
            yield name, text

    def _jsonl(self, name: str, path: Path) -> Iterator[tuple[str, str]]:
        try:
            with open(path, "rb") as lines:
                for number, line in enumerate(lines, start=1):
                    text = self._json_text(f"{path}:{number}", line)
                    if text:
                        yield f"{name}/{number}", text
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; expected a readable file: mend it or leave it out") from None

    def _json_text(self, place: str, line: bytes) -> str:
        if not line.strip():
            return ""
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place}: not JSON ({error}); expected one object a line: mend the line") from None
        text = record.get(self.json_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            keys = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
            raise InputError(f"{place}: no text under {self.json_key!r} (found: {keys}); give the right one with --json-key")
        if LONE_SURROGATE.search(text):
            raise InputError(f"{place}: half a surrogate pair under {self.json_key!r}; expected Unicode text: mend the line")
        return text


def find_source(inputs: list[Path], exclude: tuple[str, ...] = (), json_key: str = "text") -> Source:
    """All text files of the inputs: files as they are, folders with the suffixes of text and source code, *.jsonl included.

    Args:
        exclude: names of files or folders to leave out, wherever they lie.

    Raises:
        InputError: an input does not exist, or there is no file at all.
    """
    try:
        files = [(_name(relative), path) for given in inputs for relative, path in _find(given, exclude)]
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; expected files that can be read: mend it or leave it out") from None
    if not files:
        raise InputError(f"no text files in {', '.join(map(str, inputs))}; expected files such as *.py, *.txt, *.jsonl")
    return Source(sorted(files), json_key)


def _find(given: Path, exclude: tuple[str, ...]) -> Iterator[tuple[Path, Path]]:
    """(path below the folder `given`, path) of each text file; for a file `given`, its name and itself."""
    if given.is_dir():
        for path in given.rglob("*"):
            relative = path.relative_to(given)
            wanted = path.suffix in TEXT_SUFFIXES or path.suffix == ".jsonl"
            if wanted and not any(part in exclude for part in relative.parts) and path.is_file():
                yield relative, path
    elif not given.is_file():
        raise InputError(f"{given} does not exist; expected a text file, a .jsonl file or a folder")
    elif given.name not in exclude:
        yield Path(given.name), given


def standard_library() -> Source:
    """The Python sources of the running interpreter's standard library, without its tests and installed packages."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = find_source([folder], STANDARD_LIBRARY_EXCLUDED)
    return Source([(name, path) for name, path in found.files if path.suffix == ".py"])


def _cut(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        longest = start + 2 * PIECE_CHARACTERS
        end = text.find("\n", start + PIECE_CHARACTERS - 1, longest) + 1 or longest
        yield text[start:end]
        start = end


def _name(path: Path) -> str:
    """The path as text that can be encoded and printed, even if the file system's name is not UTF-8."""
    return path.as_posix().encode(errors="backslashreplace").decode()
