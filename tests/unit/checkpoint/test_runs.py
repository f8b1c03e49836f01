"""Reading runs and their checkpoints, and writing runs."""

import dataclasses
from pathlib import Path

import pytest
import torch

from megamtp.checkpoint import runs, store
from megamtp.checkpoint.tensors import read_tensor
from megamtp.errors import CheckpointError
from tests.checkpoints import SMALL, STATE, contents, random_model, with_moments


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Skips fsync, which is slow. No test here kills its process."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def run(tmp_path) -> Path:
    runs.write(with_moments(SMALL), tmp_path / "run")
    return tmp_path / "run"


def test_round_trip_is_bit_exact(run):
    read, expected = runs.read(run), with_moments(SMALL)
    assert (read.model, read.step, read.state) == (expected.model, 9, STATE)
    assert read.sources.keys() == expected.sources.keys() == {"weight", "exp_avg", "exp_avg_sq"}
    for kind, source in expected.sources.items():
        assert read.sources[kind].shapes == source.shapes
        for name in source.shapes:
            assert torch.equal(read_tensor(read.sources[kind], name), read_tensor(source, name))


def test_run_and_its_checkpoints_are_detected(run, tmp_path):
    checkpoint = run / "checkpoints/step-0000009"
    assert runs.is_run(run) and runs.is_run(checkpoint)
    assert not runs.is_run(tmp_path) and not runs.is_run(run / "checkpoints")
    assert runs.find_checkpoint(run) == runs.find_checkpoint(checkpoint) == (checkpoint, run)


def test_checkpoint_in_a_linked_folder(run, tmp_path):
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere")
    (checkpoint,) = store.checkpoints(run)
    assert runs.find_checkpoint(checkpoint) == (checkpoint, run)
    assert runs.read(checkpoint).weights.shapes == runs.read(run).weights.shapes


def test_path_relative_to_the_checkpoints_folder(run, monkeypatch):
    monkeypatch.chdir(run / "checkpoints")
    assert runs.find_checkpoint(Path("step-0000009")) == (run / "checkpoints/step-0000009", run)


@pytest.mark.parametrize("option", ["without a state", "in 16 bits"])
def test_contents_from_which_no_run_can_resume_are_refused(option, tmp_path):
    if option == "without a state":
        source, dtype, words = contents(SMALL, random_model(SMALL).state_dict()), torch.float32, "no optimizer state"
    else:
        source, dtype, words = with_moments(SMALL), torch.bfloat16, "in fp32, not torch.bfloat16; leave --dtype out"
    with pytest.raises(CheckpointError, match=words):
        runs.write(source, tmp_path / "run", dtype)
    assert not list(tmp_path.iterdir())


def test_special_ids_are_written_and_read(tmp_path):
    runs.write(dataclasses.replace(with_moments(SMALL), special_ids={"eos_token_id": 2}), tmp_path / "run")
    assert runs.read(tmp_path / "run").special_ids == {"eos_token_id": 2}
