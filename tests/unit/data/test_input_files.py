"""Documents: a reproducible order, exact content, and error messages that name the file and the line."""

import bz2
import gzip
import json
import lzma
import os
import random
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from megamtp.data import input_files
from megamtp.data.input_files import find_source, standard_library
from megamtp.data.records import JSON_LINES
from megamtp.errors import InputError

TREE = {"b.py": "b = 1\r\n\tb\r\n", "a/z.txt": "z\u2581 \n", "a/b/c.md": "# c", "B.py": "B = 1", "a.txt": "a"}


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def refusal(function, *arguments) -> str:
    with pytest.raises(InputError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def read(*inputs: Path, **options) -> list[tuple[str, str]]:
    return list(find_source(list(inputs), **options).documents())


def test_order_and_names_do_not_depend_on_the_file_system(tmp_path, monkeypatch):
    expected = sorted(TREE.items())
    walk = os.walk
    for seed in range(5):

        def shuffled(folder, onerror, seed=seed):
            visits = list(walk(folder, onerror=onerror))
            for path, folders, names in random.Random(seed).sample(visits, len(visits)):
                yield path, folders, random.Random(seed).sample(names, len(names))

        monkeypatch.setattr(os, "walk", shuffled)
        folder = write(tmp_path / f"{seed}/corpus", dict(random.Random(seed).sample(list(TREE.items()), len(TREE))))
        assert read(folder) == expected
    inputs = [write(tmp_path / "other", {"c.py": "c"}), folder, tmp_path / "0/corpus/b.py"]
    assert read(*inputs) == read(*reversed(inputs))


def test_every_utf8_file_in_a_folder_is_read_as_text(tmp_path):
    files = {
        **TREE,
        "LICENSE": "free",
        "Makefile": "all:\n",
        "lib/A.PM": "package A;",
        "package.json": '{\n "name": "a"\n}\n',
    }
    write(tmp_path, {**files, "picture.png": b"\x89PNG", "zip": b"PK\3\4\0", "empty.py": ""})
    (tmp_path / "folder.py").mkdir()
    source = find_source([tmp_path])
    reader = source.reader()
    assert list(source.documents(reader)) == sorted(files.items())
    assert (reader.not_utf8, source.passed_over) == (["picture.png"], {input_files.BINARY: ["zip"]})


def test_json_lines_are_detected_by_content(tmp_path):
    line = '{"text": "words"}\n'
    compressed = {"a.jsonl.bz2": bz2.compress, "b.JSONL.XZ": lzma.compress, "c.ndjson.gz": gzip.compress}
    files = {name: compress(line.encode()) for name, compress in compressed.items()}
    write(tmp_path, files | {"d.jsonl": line, "e.NDJSON": line, "part-00000": line * 2, "f.json": line})
    assert Counter(text for _, text in read(tmp_path)) == {"words": 8}
    assert {file.format for file in find_source([tmp_path]).files} == {JSON_LINES}


def test_passed_over_files_are_reported_by_reason(tmp_path):
    write(
        tmp_path,
        {**TREE, ".git/config": "x", ".editorconfig": "x", "build/a.py": "x", "a/build/b.py": "x", "z.lock": "x"},
    )
    (tmp_path / "link").symlink_to(tmp_path / "a", target_is_directory=True)
    os.mkfifo(tmp_path / "pipe")
    source = find_source([tmp_path], exclude=("build", "*.lock"))
    assert list(source.documents()) == sorted(TREE.items())
    assert source.passed_over == {
        input_files.EXCLUDED: ["a/build", "build", "z.lock"],
        input_files.HIDDEN: [".editorconfig", ".git"],
        input_files.LINKS: ["link"],
        input_files.SPECIAL: ["pipe"],
    }
    assert read(tmp_path / ".git") == [("config", "x")] and read(tmp_path / ".editorconfig") == [(".editorconfig", "x")]


@pytest.mark.parametrize("name", ["a/broken.py", "broken.jsonl", "broken", "broken.bin"])
def test_dangling_link_is_refused_unless_it_is_excluded(tmp_path, name):
    """Incomplete downloads leave such links; their text would be missing from the corpus."""
    write(tmp_path, TREE)
    (tmp_path / name).symlink_to("../blobs/none")
    own = {"own_files": [tmp_path / "out/broken.bin"]}
    message = refusal(partial(find_source, **own), [tmp_path])
    assert message.startswith(f"{tmp_path}/{name} is a link to ../blobs/none, which does not exist; expected ")
    assert read(tmp_path, exclude=("broken*",)) == sorted(TREE.items())
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / name)
    assert refusal(partial(find_source, **own), [tmp_path]).startswith(
        f"{tmp_path}/{name}: Too many levels of symbolic links; "
    )


def test_binary_file_that_the_user_named_is_refused(tmp_path):
    write(tmp_path, {**TREE, "all.tar": b"a.txt" + bytes(500)})
    message = refusal(find_source, [tmp_path / "a.txt", tmp_path / "all.tar"])
    assert message.startswith(f"{tmp_path}/all.tar is binary or UTF-16 (it has zero bytes); expected UTF-8 text, ")


@pytest.mark.parametrize(
    ("file_format", "expected"),
    [("text", [("a", '{"text": "x"}\n{}')]), ("jsonl", "a:2: no text under"), ("parquet", "a: damaged")],
)
def test_format_of_all_inputs_can_be_given(tmp_path, file_format, expected):
    source = find_source([write(tmp_path, {"a": '{"text": "x"}\n{}'})], file_format=file_format)
    if isinstance(expected, str):
        assert f"{tmp_path}/{expected}" in refusal(list, source.documents())
    else:
        assert list(source.documents()) == expected


def test_json_files_are_json_lines_or_the_settings_of_a_source_tree(tmp_path):
    line = '{"text": "two words"}'
    write(
        tmp_path,
        {"loose.json": line, "x/LARGE.JSONL": line, "x/Mod.PY": "x = 1", "y.json.GZ": gzip.compress(line.encode())},
    )
    records = [
        ("loose.json/0", "two words"),
        ("x/LARGE.JSONL/0", "two words"),
        ("x/Mod.PY", "x = 1"),
        ("y.json.GZ/0", "two words"),
    ]
    assert read(tmp_path) == records
    assert read(tmp_path / "loose.json") == records[:1]
    settings = '{\n  "key": 1\n}\n'
    write(tmp_path, {"settings.json": settings})
    assert read(tmp_path)[1] == ("settings.json", settings)
    assert refusal(read, tmp_path / "settings.json").startswith(f"{tmp_path}/settings.json:1: not JSON ")


def test_files_that_are_not_utf8_are_passed_over_and_reported(tmp_path):
    write(
        tmp_path,
        {"latin.txt": "caf\u00e9".encode("latin-1"), "good.txt": "caf\u00e9", "x/wide.py": "x = 1".encode("utf-16")},
    )
    source = find_source([tmp_path])
    reader = source.reader()
    assert list(source.documents(reader)) == [("good.txt", "caf\u00e9")]
    assert reader.not_utf8 == ["latin.txt"]
    assert source.passed_over == {input_files.BINARY: ["x/wide.py"]}


def test_names_that_are_not_utf8_can_be_printed(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    ((name, text),) = read(tmp_path)
    assert (name, text) == ("caf\\udce9.txt", "text")
    assert name.encode().isascii()


def test_excluded_names(tmp_path):
    write(tmp_path, TREE)
    assert [name for name, _ in read(tmp_path, exclude=("b", "B.py"))] == ["a.txt", "a/z.txt", "b.py"]
    assert [name for name, _ in read(tmp_path, exclude=("a",))] == ["B.py", "a.txt", "b.py"]
    assert [name for name, _ in read(tmp_path / "a.txt", tmp_path / "b.py", exclude=("b.py",))] == ["a.txt"]
    assert "no text files" in refusal(find_source, [tmp_path / "a.txt"], ("a.txt",))


def test_missing_input_is_refused(tmp_path):
    write(tmp_path, TREE)
    assert refusal(find_source, [tmp_path, tmp_path / "none"]).startswith(f"{tmp_path}/none does not exist; expected ")
    assert "File name too long" in refusal(find_source, [tmp_path / ("x" * 300)])


def test_named_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    assert refusal(find_source, [tmp_path / "pipe.txt"]).startswith(
        f"{tmp_path}/pipe.txt is neither a file nor a folder; expected "
    )


def test_unreadable_folder_is_refused_unless_it_is_excluded(tmp_path, monkeypatch):
    """A corpus must never silently lack files."""
    write(tmp_path, TREE)
    listing = os.scandir

    def scandir(folder):
        if Path(folder).name == "b":
            raise PermissionError(13, "Permission denied", str(folder))
        return listing(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    assert refusal(find_source, [tmp_path]) == (
        f"{tmp_path}/a/b: Permission denied; expected files that can be read: fix it or leave it out"
    )
    assert [name for name, _ in read(tmp_path, exclude=("b",))] == ["B.py", "a.txt", "a/z.txt", "b.py"]


def test_inputs_without_text_are_refused(tmp_path):
    write(tmp_path, {"picture.png": b"\x89PNG\0", ".hidden": "x"})
    passed_over = "passed over 1 binary or UTF-16 files, passed over 1 hidden files and folders"
    assert refusal(find_source, [tmp_path]).startswith(f"no text files in {tmp_path}, {passed_over}; expected ")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_file_that_has_been_removed_is_named(tmp_path, name):
    source = find_source([write(tmp_path, {name: '{"text": "a"}'})])
    (tmp_path / name).unlink()
    assert refusal(list, source.documents()).startswith(f"{tmp_path}/{name}: No such file")


def test_each_json_line_is_a_document(tmp_path):
    texts = ["one\n\u2581two\r\n", "", "three"]
    lines = [json.dumps({"id": 1, "body": text}) for text in texts]
    path = write(tmp_path, {"a.jsonl": "\n".join([*lines[:2], " ", lines[2]])}) / "a.jsonl"
    expected = [("a.jsonl/0", texts[0]), (f"a.jsonl/{sum(len(line) + 1 for line in [*lines[:2], ' '])}", "three")]
    assert read(path, json_key="body") == expected
    assert read(tmp_path, json_key="body") == expected


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"txt": "a", "new\\nline": 1}', ["no text under 'text'", "found: 'txt', 'new\\nline'", "--json-key"]),
        (b'{"text": 3}', ["'text' is int; expected a string"]),
        (b'{"text": null}', ["'text' is null; expected a string"]),
        (b'["text"]', ["a JSON list", "one object per line"]),
        (b"3", ["a JSON int", "one object per line"]),
        (b'{"text": "a"', ["not JSON", "one object per line"]),
        (b"plain text", ["not JSON"]),
        (b'{"text": "caf\xe9"}', ["not JSON", "utf-8"]),
        (b"[" * 100_000, ["not JSON", "recursion"]),
        (b'{"text": "a\\ud800b"}', ["half a surrogate pair", "'text'"]),
    ],
)
def test_bad_jsonl_line_is_named(tmp_path, line, words):
    write(tmp_path, {"bad.jsonl": b'{"text": "good"}\n\n' + line + b"\n"})
    message = refusal(list, find_source([tmp_path]).documents())
    assert message.startswith(f"{tmp_path}/bad.jsonl:3: ")
    assert all(word in message for word in words), message


@pytest.mark.parametrize("number", [1, 39, 40])
def test_few_documents_are_cut_into_pieces(tmp_path, number):
    text = "".join(f"line {line}\n" for line in range(4000))
    source = find_source([write(tmp_path, {f"{index:02}.txt": text for index in range(number)})])
    pieces = list(source.pieces())
    if number == 40:
        assert pieces == list(source.documents())
        return
    names = [f"{index:02}.txt/{piece}" for index in range(number) for piece in range(3)]
    assert [name for name, _ in pieces] == names
    assert "".join(piece for _, piece in pieces) == text * number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abc\n", ["abc\n"]),
        ("abc\nd", ["abc\n", "d"]),
        ("a\nb\nc\nd\ne", ["a\nb\n", "c\nd\n", "e"]),
        ("a\r\n\r\nb\r\n", ["a\r\n\r\n", "b\r\n"]),
        ("abcdefghijklmnopqr", ["abcdefgh", "ijklmnop", "qr"]),
        ("abcdefg\nijk", ["abcdefg\n", "ijk"]),
        ("abcdefgh\nijk", ["abcdefgh", "\nijk"]),
        ("\n" * 9, ["\n" * 4, "\n" * 4, "\n"]),
    ],
)
def test_pieces_end_at_line_ends_unless_a_line_is_too_long(tmp_path, monkeypatch, text, expected):
    monkeypatch.setattr(input_files, "PIECE_CHARACTERS", 4)
    source = find_source([write(tmp_path, {"a.txt": text})])
    assert [piece for _, piece in source.pieces()] == expected


def test_standard_library_contains_python_files_without_tests():
    source = standard_library()
    names = [file.name for file in source.files]
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert all(name.endswith(".py") for name in names)
    assert not any(part in ("test", "tests", "site-packages") for name in names for part in name.split("/"))
    assert names == sorted(set(names))
