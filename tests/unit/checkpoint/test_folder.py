"""Folders are created atomically, also after conversions that were killed."""

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from megamtp.checkpoint import folder
from megamtp.errors import CheckpointError

ROOT = Path(__file__).parents[3]


def write(directory: Path, num_bytes: int = 0) -> None:
    with folder.atomic_folder(directory, num_bytes, replaceable=True) as new:
        (new / "file").write_text("content")


@pytest.fixture
def killed_work_folder(tmp_path) -> Path:
    """Creates the work folder that a killed conversion leaves behind."""
    work = tmp_path / ".exported.partial"
    (work / "new/deep").mkdir(parents=True)
    (work / "new/deep/file").write_bytes(bytes(5000))
    (work / "lock").write_bytes(b"")
    return work


def test_files_of_a_killed_conversion_are_removed(killed_work_folder, tmp_path):
    write(tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == ["file", folder.EXPORT_LIST]


def test_files_of_a_killed_conversion_count_as_free_space(killed_work_folder, tmp_path, monkeypatch):
    usage = folder.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="needs 1,001 bytes, but only 1,000 are free"):
        write(tmp_path / "exported", num_bytes=6001)
    assert killed_work_folder.exists()
    write(tmp_path / "exported", num_bytes=6000)
    assert (tmp_path / "exported/file").exists()


def test_second_conversion_to_the_same_folder_is_refused(killed_work_folder, tmp_path):
    with open(killed_work_folder / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(
            CheckpointError, match=r"another process is writing to .*exported\.partial; expected one process at a time"
        ):
            write(tmp_path / "exported")
    assert (killed_work_folder / "new/deep/file").exists()
    write(tmp_path / "exported")
    assert (tmp_path / "exported/file").read_text() == "content"


def test_interrupted_conversion_leaves_no_files(tmp_path):
    with pytest.raises(KeyboardInterrupt), folder.atomic_folder(tmp_path / "exported", 0) as new:
        (new / "file").write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


KILLED = """
import contextlib, sys
from pathlib import Path
from megamtp import files
from megamtp.checkpoint import folder
from tests.kills import killed_at_each_line

exported, atomically = Path(sys.argv[1]) / "exported", sys.argv[2] == "atomically"
files.fsync = folder.fsync = lambda path: None  # slow, and a killed process loses no written data
if not atomically:
    files._exchange_atomically = lambda first, second: False

def export(content):
    with folder.atomic_folder(exported, 0, replaceable=True) as new:
        for name in "ab":
            (new / name).write_text(content)

contents = []
lines_of = ("megamtp/checkpoint/folder.py", "megamtp/files.py")
for kill in killed_at_each_line(lines_of, lambda: export("old"), lambda: export("new")):
    if not atomically:  # the folder may be missing until the next conversion starts
        with contextlib.suppress(KeyboardInterrupt), folder.atomic_folder(exported, 0, replaceable=True):
            raise KeyboardInterrupt
    contents.append([(exported / name).read_text() for name in "ab"])
assert contents[0] == ["old"] * 2 and contents[-1] == ["new"] * 2, contents
assert contents == sorted(contents, reverse=True) and len(contents) > 20, contents
"""


@pytest.mark.parametrize("how", ["atomically", "in three renames"])
def test_killed_replacement_leaves_the_old_or_the_new_export(tmp_path, how):
    finished = subprocess.run([sys.executable, "-c", KILLED, tmp_path, how], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_files_that_appear_in_the_destination_meanwhile_are_not_touched(tmp_path):
    with (
        pytest.raises(CheckpointError, match="holds other files"),
        folder.atomic_folder(tmp_path / "exported", 0) as new,
    ):
        (new / "file").write_text("content")
        (tmp_path / "exported").mkdir()
        (tmp_path / "exported/notes.txt").write_text("mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["exported", "notes.txt"]


def test_current_folder_is_refused(tmp_path, monkeypatch):
    """Replacing it would leave the shell in a folder that no longer exists."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", "../here", str(tmp_path / "here")):
        with pytest.raises(
            CheckpointError, match=r"is the current folder, .*; expected another folder: choose a new folder in it"
        ):
            write(Path(name))
    write(Path("new"))
    assert (tmp_path / "here/new/file").read_text() == "content"


def test_impossible_folder_names_are_refused_in_one_line(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for name in ("x" * 300, f"{'x' * 300}/new", "loop", "loop/new"):
        with pytest.raises(CheckpointError, match=r"^[^\n]* cannot be written: [^\n]*; choose another destination$"):
            folder.check_destination(tmp_path / name)


def test_mount_point_is_refused():
    with pytest.raises(CheckpointError, match=r"/proc is a mount point, .*; expected a folder: choose a folder in it"):
        folder.check_destination(Path("/proc"))


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"x" * 300, "\u00e9".encode() * 150, b"a\0b", b"../step", b"a/b", b"/step"]
)
def test_file_without_a_valid_name_is_refused(tmp_path, content):
    (tmp_path / "latest").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"^[^\n]*latest cannot be read \([^\n]*\); expected the name of a folder beside it"
    ):
        folder.read_name(tmp_path / "latest")


def test_read_name(tmp_path):
    (tmp_path / "latest").write_text("global_step7\n")
    assert folder.read_name(tmp_path / "latest") == "global_step7"


def test_folder_is_synced_before_and_its_parent_after_the_rename(tmp_path, monkeypatch):
    calls, rename = [], folder.os.rename
    monkeypatch.setattr(folder, "fsync", calls.append)
    monkeypatch.setattr(folder.os, "rename", lambda *paths: calls.append(paths) or rename(*paths))
    with folder.atomic_folder(tmp_path / "made", 5) as new:
        (new / "file").write_text("whole")
    assert calls == [new / "file", new, (new, tmp_path / "made"), tmp_path]
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "file"]
