"""Tests of the checkpoint that a run resumes from: damaged ones are skipped, those of a newer format are errors."""

import json

import pytest

from megamtp.checkpoint import store
from megamtp.errors import CheckpointError
from megamtp.training import resuming
from tests.unit.checkpoint.test_store import damage, publish


def test_damaged_checkpoints_are_skipped_but_newer_formats_are_errors(tmp_path, monkeypatch, capsys):
    """A run that skipped a checkpoint of a newer format would resume from an older one and overwrite the newer one."""
    monkeypatch.setattr(resuming, "of_all_ranks", lambda own: [own])
    monkeypatch.setattr(resuming.dist, "broadcast_object_list", lambda objects, src: None)
    for step in (1, 2, 3):
        publish(tmp_path, step)
    (tmp_path / "checkpoints" / "step-0000003" / "shard-1").write_bytes(b"weightz")
    assert resuming.newest_verified(tmp_path, 0, 1)[1].step == 2
    assert "skipped step-0000003: " in capsys.readouterr().out
    path = tmp_path / "checkpoints" / "step-0000002" / store.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 3}))
    with pytest.raises(store.FormatError, match="format 3"):
        resuming.newest_verified(tmp_path, 0, 1)


@pytest.mark.parametrize("kind", ["truncated", "truncated manifest", "flipped bit"])
def test_error_if_all_checkpoints_are_damaged(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(resuming, "of_all_ranks", lambda own: [own])
    monkeypatch.setattr(resuming.dist, "broadcast_object_list", lambda objects, src: None)
    for step in (1, 2):
        damage(publish(tmp_path, step), kind)
    with pytest.raises(CheckpointError, match=r"none of 2 checkpoints is intact .*step-0000002") as error:
        resuming.newest_verified(tmp_path, 0, 1)
    assert "older" not in str(error.value)
    assert str(error.value).endswith("; restore one, or start over: remove them, or choose another run.directory")
    if kind != "flipped bit":  # newest_readable does not read all bytes
        with pytest.raises(CheckpointError) as same_error:
            resuming.newest_readable(tmp_path, check_files=True)
        assert str(same_error.value) == str(error.value)
