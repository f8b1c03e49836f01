"""A run's folder and its checkpoints as contents, and contents written as a run."""

import dataclasses
from pathlib import Path

import pytest
import torch

from megamtp.checkpoint import runs, store
from megamtp.checkpoint.tensors import whole
from megamtp.errors import CheckpointError
from tests.checkpoints import SMALL, STATE, contents, random_model, with_moments


@pytest.fixture(autouse=True)
def nothing_is_synced(monkeypatch):
    """No test here ends its process amid a write."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def run(tmp_path) -> Path:
    runs.write(with_moments(SMALL), tmp_path / "run")
    return tmp_path / "run"


def test_a_written_run_is_read_back_bit_for_bit(run):
    found, expected = runs.read(run), with_moments(SMALL)
    assert (found.model, found.step, found.state) == (expected.model, 9, STATE)
    assert found.sources.keys() == expected.sources.keys() == {"weight", "exp_avg", "exp_avg_sq"}
    for kind, source in expected.sources.items():
        assert found.sources[kind].shapes == source.shapes
        assert all(torch.equal(whole(found.sources[kind], name), whole(source, name)) for name in source.shapes)


def test_a_run_and_its_checkpoints_are_recognised(run, tmp_path):
    checkpoint = run / "checkpoints/step-0000009"
    assert runs.is_run(run) and runs.is_run(checkpoint)
    assert not runs.is_run(tmp_path) and not runs.is_run(run / "checkpoints")
    assert runs.find_checkpoint(run) == runs.find_checkpoint(checkpoint) == (checkpoint, run)


def test_a_checkpoint_in_a_linked_folder(run, tmp_path):
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere")
    (checkpoint,) = store.checkpoints(run)
    assert runs.find_checkpoint(checkpoint) == (checkpoint, run)
    assert runs.read(checkpoint).weights.shapes == runs.read(run).weights.shapes


def test_a_path_relative_to_the_checkpoints_folder(run, monkeypatch):
    monkeypatch.chdir(run / "checkpoints")
    assert runs.find_checkpoint(Path("step-0000009")) == (run / "checkpoints/step-0000009", run)


@pytest.mark.parametrize("option", ["without a state", "in 16 bits"])
def test_what_no_run_can_go_on_with_is_not_written(option, tmp_path):
    if option == "without a state":
        source, dtype, words = contents(SMALL, random_model(SMALL).state_dict()), torch.float32, "no optimizer state"
    else:
        source, dtype, words = with_moments(SMALL), torch.bfloat16, "in fp32, not torch.bfloat16; leave --dtype out"
    with pytest.raises(CheckpointError, match=words):
        runs.write(source, tmp_path / "run", dtype)
    assert not list(tmp_path.iterdir())


def test_ids_of_special_tokens_lie_beside_the_checkpoint(tmp_path):
    runs.write(dataclasses.replace(with_moments(SMALL), special_ids={"eos_token_id": 2}), tmp_path / "run")
    assert runs.read(tmp_path / "run").special_ids == {"eos_token_id": 2}
