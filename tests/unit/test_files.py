"""Atomic writes, exchange of folder names, and locks."""

import errno
import fcntl
import os

import pytest

from megamtp import files
from megamtp.files import exchange, open_atomically, take_lock, write_atomically


def test_atomic_write_replaces_the_file_and_leaves_no_temporary_file(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_interrupted_write_leaves_the_old_content(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), open_atomically(tmp_path / "file") as stream:
        stream.write(b"half of the new")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("atomically", [True, False])
def test_exchange_swaps_the_names_of_folders(tmp_path, monkeypatch, atomically):
    if not atomically:  # as on NFS
        monkeypatch.setattr(files, "_exchange_atomically", lambda first, second: False)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    exchange(tmp_path / "first", tmp_path / "second", temporary=tmp_path / "temporary")
    assert (tmp_path / "first/content").read_text() == "second"
    assert (tmp_path / "second/content").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_exchange_names_a_missing_folder(tmp_path):
    (tmp_path / "first").mkdir()
    with pytest.raises(FileNotFoundError) as error:
        exchange(tmp_path / "first", tmp_path / "second", temporary=tmp_path / "temporary")
    assert (error.value.filename, error.value.filename2) == (str(tmp_path / "first"), str(tmp_path / "second"))
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_only_one_stream_can_hold_the_lock(tmp_path):
    with open(tmp_path / "lock", "wb") as first, open(tmp_path / "lock", "wb") as second:
        assert take_lock(first, tmp_path, "advice")
        assert not take_lock(second, tmp_path, "advice")
        first.close()
        assert take_lock(second, tmp_path, "advice")


def test_warning_where_files_cannot_be_locked(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with open(tmp_path / "lock", "wb") as stream:
        assert take_lock(stream, tmp_path, "start one job at a time")
    warning = f"megamtp: warning: {tmp_path} cannot be locked (No locks available): start one job at a time\n"
    assert capsys.readouterr().err == warning
