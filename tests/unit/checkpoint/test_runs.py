"""A run's folder and its checkpoints as contents, and contents written as a run."""

from megamtp.checkpoint import formats, runs, store
from tests.checkpoints import SMALL, with_moments


def test_a_checkpoint_in_a_linked_folder(tmp_path):
    run_directory = tmp_path / "run"
    runs.write(with_moments(SMALL), run_directory)
    (run_directory / "checkpoints").rename(tmp_path / "elsewhere")
    (run_directory / "checkpoints").symlink_to(tmp_path / "elsewhere")
    (checkpoint,) = store.checkpoints(run_directory)
    assert runs.find_checkpoint(checkpoint) == (checkpoint, run_directory)
    assert formats.read(checkpoint).weights.shapes == formats.read(run_directory).weights.shapes
