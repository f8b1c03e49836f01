"""Files and folders that are replaced as a whole, and locks."""

import errno
import fcntl
import os

import pytest

from megamtp import files
from megamtp.files import exchange, open_atomically, take_lock, write_atomically


def test_a_file_has_the_new_content_and_no_neighbour_is_left(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interrupted_writer_leaves_the_old_content(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), open_atomically(tmp_path / "file") as stream:
        stream.write(b"half of the new")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("at_once", [True, False])
def test_folders_exchange_their_names(tmp_path, monkeypatch, at_once):
    if not at_once:  # as on NFS
        monkeypatch.setattr(files, "_exchange_at_once", lambda one, other: False)
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    exchange(tmp_path / "one", tmp_path / "other", aside=tmp_path / "aside")
    assert (tmp_path / "one/content").read_text() == "other"
    assert (tmp_path / "other/content").read_text() == "one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other"]


def test_a_folder_that_is_missing_is_named(tmp_path):
    (tmp_path / "one").mkdir()
    with pytest.raises(FileNotFoundError) as error:
        exchange(tmp_path / "one", tmp_path / "other", aside=tmp_path / "aside")
    assert (error.value.filename, error.value.filename2) == (str(tmp_path / "one"), str(tmp_path / "other"))
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_one_stream_at_a_time_has_the_lock(tmp_path):
    with open(tmp_path / "lock", "wb") as first, open(tmp_path / "lock", "wb") as second:
        assert take_lock(first, tmp_path, "advice")
        assert not take_lock(second, tmp_path, "advice")
        first.close()
        assert take_lock(second, tmp_path, "advice")


def test_where_files_cannot_be_locked_there_is_a_warning(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with open(tmp_path / "lock", "wb") as stream:
        assert take_lock(stream, tmp_path, "start one job at a time")
    words = f"megamtp: warning: {tmp_path} cannot be locked (No locks available): start one job at a time\n"
    assert capsys.readouterr().err == words
