"""The checkpoint that a run goes on from: damaged ones are skipped, those of a later format are not."""

import json

import pytest

from megamtp.checkpoint import store
from megamtp.errors import CheckpointError
from megamtp.training import resuming
from tests.unit.checkpoint.test_store import damage, publish


def test_a_run_passes_over_damage_but_over_no_other_format(tmp_path, monkeypatch, capsys):
    """A checkpoint of a later version is newer than what it would go on from, and it would overwrite that."""
    monkeypatch.setattr(resuming, "of_all_ranks", lambda own: [own])
    monkeypatch.setattr(resuming.dist, "broadcast_object_list", lambda found, src: None)
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
def test_a_run_of_which_no_checkpoint_is_whole_has_no_older_one_to_go_on_from(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(resuming, "of_all_ranks", lambda own: [own])
    monkeypatch.setattr(resuming.dist, "broadcast_object_list", lambda found, src: None)
    for step in (1, 2):
        damage(publish(tmp_path, step), kind)
    with pytest.raises(CheckpointError, match=r"none of 2 checkpoints verifies .*step-0000002") as error:
        resuming.newest_verified(tmp_path, 0, 1)
    assert "older" not in str(error.value)
    assert str(error.value).endswith("; restore one, or begin anew: remove them, or choose another run.directory")
    if kind != "flipped bit":  # which takes reading all bytes
        with pytest.raises(CheckpointError) as at_once:
            resuming.newest_readable(tmp_path, check_files=True)
        assert str(at_once.value) == str(error.value)
