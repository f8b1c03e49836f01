"""A conversion's result appears whole or not at all; what a killed conversion left is no obstacle."""

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from megamtp.checkpoint import folder
from megamtp.errors import CheckpointError

ROOT = Path(__file__).parents[3]


def write(directory: Path, num_bytes: int = 0) -> None:
    with folder.published(directory, num_bytes, replaceable=True) as new:
        (new / "file").write_text("content")


@pytest.fixture
def left_by_a_killed_one(tmp_path) -> Path:
    work = tmp_path / ".exported.partial"
    (work / "new/deep").mkdir(parents=True)
    (work / "new/deep/file").write_bytes(bytes(5000))
    (work / "lock").write_bytes(b"")
    return work


def test_what_a_killed_conversion_left_is_removed(left_by_a_killed_one, tmp_path):
    write(tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == ["file", folder.EXPORT_LIST]


def test_its_room_counts_as_free(left_by_a_killed_one, tmp_path, monkeypatch):
    usage = folder.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="needs 1,001 bytes, 1,000 are free"):
        write(tmp_path / "exported", num_bytes=6001)
    assert left_by_a_killed_one.exists()
    write(tmp_path / "exported", num_bytes=6000)
    assert (tmp_path / "exported/file").exists()


def test_two_conversions_to_one_place_are_refused(left_by_a_killed_one, tmp_path):
    with open(left_by_a_killed_one / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(
            CheckpointError, match=r"another process writes to .*exported\.partial; expected one at a time"
        ):
            write(tmp_path / "exported")
    assert (left_by_a_killed_one / "new/deep/file").exists()
    write(tmp_path / "exported")
    assert (tmp_path / "exported/file").read_text() == "content"


def test_an_interrupted_conversion_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), folder.published(tmp_path / "exported", 0) as new:
        (new / "file").write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


KILLED = """
import contextlib, sys
from pathlib import Path
from megamtp import files
from megamtp.checkpoint import folder
from tests.kills import killed_at_each_line

exported, at_once = Path(sys.argv[1]) / "exported", sys.argv[2] == "at once"
files.sync = folder.sync = lambda path: None  # kills lose nothing that is not on disk yet
if not at_once:
    files._exchange_at_once = lambda one, other: False

def export(content):
    with folder.published(exported, 0, replaceable=True) as new:
        for name in "ab":
            (new / name).write_text(content)

found = []
files = ("megamtp/checkpoint/folder.py", "megamtp/files.py")
for kill in killed_at_each_line(files, lambda: export("old"), lambda: export("new")):
    if not at_once:  # the name may be free now, until the next conversion begins
        with contextlib.suppress(KeyboardInterrupt), folder.published(exported, 0, replaceable=True):
            raise KeyboardInterrupt
    found.append([(exported / name).read_text() for name in "ab"])
assert found[0] == ["old"] * 2 and found[-1] == ["new"] * 2 and found == sorted(found, reverse=True), found
assert len(found) > 20
"""


@pytest.mark.parametrize("how", ["at once", "in three renames"])
def test_a_killed_replacement_leaves_the_old_export_or_the_new(tmp_path, how):
    finished = subprocess.run([sys.executable, "-c", KILLED, tmp_path, how], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_what_came_to_the_destination_meanwhile_is_left_alone(tmp_path):
    with pytest.raises(CheckpointError, match="holds other files"), folder.published(tmp_path / "exported", 0) as new:
        (new / "file").write_text("content")
        (tmp_path / "exported").mkdir()
        (tmp_path / "exported/notes.txt").write_text("mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["exported", "notes.txt"]


def test_the_current_folder_is_refused(tmp_path, monkeypatch):
    """Replacing it would leave the shell in a folder that is gone."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", "../here", str(tmp_path / "here")):
        with pytest.raises(
            CheckpointError, match=r"is the current folder, .*; expected another: choose a new folder in it"
        ):
            write(Path(name))
    write(Path("new"))
    assert (tmp_path / "here/new/file").read_text() == "content"


def test_names_that_no_folder_can_have_are_one_line(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for name in ("x" * 300, f"{'x' * 300}/new", "loop", "loop/new"):
        with pytest.raises(CheckpointError, match=r"^[^\n]* cannot be written: [^\n]*; choose another destination$"):
            folder.check_destination(tmp_path / name)


def test_a_mount_point_is_refused_at_once():
    with pytest.raises(CheckpointError, match=r"/proc is a mount point, .*; expected a folder: choose one in it"):
        folder.check_destination(Path("/proc"))


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"x" * 300, "\u00e9".encode() * 150, b"a\0b", b"../step", b"a/b", b"/step"]
)
def test_a_file_that_names_no_neighbour_is_refused(tmp_path, content):
    (tmp_path / "latest").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"^[^\n]*latest cannot be read \([^\n]*\); expected the name of a folder beside it"
    ):
        folder.name_in(tmp_path / "latest")


def test_the_name_of_a_neighbour(tmp_path):
    (tmp_path / "latest").write_text("global_step7\n")
    assert folder.name_in(tmp_path / "latest") == "global_step7"


def test_a_folder_is_on_disk_before_it_has_its_name_and_then_so_is_that(tmp_path, monkeypatch):
    calls, rename = [], folder.os.rename
    monkeypatch.setattr(folder, "sync", calls.append)
    monkeypatch.setattr(folder.os, "rename", lambda *paths: calls.append(paths) or rename(*paths))
    with folder.published(tmp_path / "made", 5) as new:
        (new / "file").write_text("whole")
    assert calls == [new / "file", new, (new, tmp_path / "made"), tmp_path]
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "file"]
