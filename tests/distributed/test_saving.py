"""Tests of saving in the background: which state is saved, and errors of one rank become errors of all."""

import errno
import os
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamtp.checkpoint import store
from megamtp.errors import CheckpointError
from tests.cases import global_batch, own_share, small_config
from tests.ranks import run_ranks
from tests.saved import NoMetrics, load_weights, save


def _step(config, engine, step: int) -> None:
    from megamtp.engines.base import count_targets

    own = own_share(global_batch(config, step, 2), engine.rank, 2)
    engine.train_batch(own, count_targets(own, True, 2, engine.device), 1e-2)


def _weights(engine) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in engine.model.named_parameters()}


def _save_while_training(directory: str) -> tuple[dict[str, Tensor], list[tuple[bool, int]], float]:
    """Trains two steps while a checkpoint is written.

    Returns:
        The weights at the start of the save; for each step whether this rank has written and how many checkpoints are
        published; the seconds of the copy.
    """
    from megamtp.engines.zero import ZeroEngine
    from megamtp.training import saving

    config, may_write, reported = small_config(engine__kind="zero3", run__directory=directory), threading.Event(), []
    engine, write_shard = ZeroEngine(config), saving.write_shard

    class Metrics(NoMetrics):
        def report_checkpoint(self, *record) -> None:
            reported.append(record)

    def slow_write(*arguments):
        may_write.wait()
        return write_shard(*arguments)

    saving.write_shard = slow_write
    saver, seen = saving.Saver(config, engine, Metrics()), []
    _step(config, engine, 0)
    before = _weights(engine)
    saver.begin(1, {})
    for step in (1, 2):
        _step(config, engine, step)
        seen.append((saver.has_written, len(store.checkpoints(Path(directory)))))
    may_write.set()
    saver.finish()
    seen.append((saver.has_written, len(store.checkpoints(Path(directory)))))
    ((step, _, write_seconds, copy_seconds, _),) = reported
    assert step == 1 and write_seconds > 0
    return before, seen, copy_seconds


def test_training_continues_while_a_checkpoint_is_written(tmp_path):
    results = run_ranks(_save_while_training, 2, str(tmp_path))
    (checkpoint,) = store.checkpoints(tmp_path)
    _, weights = load_weights(checkpoint)
    for before, seen, copy_seconds in results:
        assert seen == [(False, 0), (False, 0), (False, 1)]
        assert all(torch.equal(weights[name], value) for name, value in before.items())
        assert 0 < copy_seconds < 5


def _error_when_rank_1_fails(directory: str, error: Exception) -> str:
    """Returns this rank's error when rank 1 raises `error` while it writes a second checkpoint."""
    from megamtp.engines.zero import ZeroEngine
    from megamtp.training import saving

    config = small_config(engine__kind="zero1", run__directory=directory)
    engine, write_shard = ZeroEngine(config), saving.write_shard
    saver = saving.Saver(config, engine, NoMetrics())
    saver.begin(1, {})
    saver.finish()

    def write(path, *rest):
        written = write_shard(path, *rest)
        if dist.get_rank() == 1:
            raise error
        return written

    saving.write_shard = write
    saver.begin(2, {})
    with pytest.raises(CheckpointError) as raised:
        saver.finish()
    return str(raised.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            "(No space left on device); make room on its disk, and start",
        ),
        (OSError(errno.EACCES, os.strerror(errno.EACCES)), "(Permission denied); change its permissions"),
        (RuntimeError("a defect"), "(a defect); check the disk, and start"),
    ],
)
def test_write_error_of_one_rank_is_raised_on_all_ranks(error, words, tmp_path):
    first, second = run_ranks(_error_when_rank_1_fails, 2, str(tmp_path), error)
    assert first == second
    assert f"step-0000002 cannot be written {words}" in first
    (checkpoint,) = store.checkpoints(tmp_path)
    assert store.verify(checkpoint).step == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [checkpoint.name]


def _save_on_small_disk(directory: str) -> tuple[str, bool]:
    """Saves on a disk with room for either rank's file but not for both.

    Returns:
        This rank's error, and whether anything was written.
    """
    from megamtp.engines.zero import ZeroEngine
    from megamtp.training import saving

    config = small_config(engine__kind="zero3", run__directory=directory)
    engine, written = ZeroEngine(config), []
    size = sum(tensor.numel() * tensor.element_size() for tensor in engine.state().tensors.values())
    shutil.disk_usage = lambda path: namedtuple("Usage", "free")(size * 3 // 2)
    saving.write_shard = lambda *arguments: written.append(arguments)
    with pytest.raises(CheckpointError) as raised:
        saving.Saver(config, engine, NoMetrics()).begin(1, {})
    return str(raised.value), bool(written)


def test_disk_must_have_room_for_the_files_of_all_ranks(tmp_path):
    first, second = run_ranks(_save_on_small_disk, 2, str(tmp_path))
    assert first == second
    assert "step-0000001 cannot be written (it needs " in first[0] and not first[1]
    assert list((tmp_path / "checkpoints").iterdir()) == []


def _save_to_separate_directories(directory: str) -> str:
    """Returns this rank's error when each rank has its own run directory."""
    from megamtp.engines.zero import ZeroEngine

    config = small_config(engine__kind="zero3", run__directory=f"{directory}/{dist.get_rank()}")
    with pytest.raises(CheckpointError) as raised:
        save(config, ZeroEngine(config), 1)
    return str(raised.value)


def test_run_directory_that_nodes_do_not_share_is_an_error(tmp_path):
    first, second = run_ranks(_save_to_separate_directories, 2, str(tmp_path))
    assert first == second
    assert (
        "0/checkpoints/step-0000001.partial/shard-00001.safetensors is missing" in first
        and "let all nodes share" in first
    )
    assert list((tmp_path / "0/checkpoints").iterdir()) == []


def _loss_scale_and_random_numbers(directory: str) -> list[tuple]:
    """Returns (state of fp16's loss scaler, next random numbers) when they were saved and after they were loaded."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    from megamtp.engines.zero import ZeroEngine

    config = small_config(1, engine__kind="zero1", run__directory=directory)
    engine = ZeroEngine(config)
    settings = {"min_scale": 1.0, "delayed_shift": 2, "consecutive_hysteresis": False}
    scaler = engine.deepspeed_engine.optimizer.loss_scaler = DynamicLossScaler(2.0**16, 3, **settings)
    for overflow in (True, True, False, False, True, False):
        scaler.update_scale(overflow)
    torch.rand(7)
    save(config, engine, 1)
    saved = vars(scaler), torch.rand(3).tolist()
    loaded = engine.deepspeed_engine.optimizer.loss_scaler = DynamicLossScaler(2.0**16, 3, **settings)
    assert vars(loaded) != vars(scaler)
    engine.load(store.newest_checkpoint(Path(directory)))
    return [saved, (vars(loaded), torch.rand(3).tolist())]


def test_loss_scale_and_random_states_are_saved(tmp_path):
    ((saved, loaded),) = run_ranks(_loss_scale_and_random_numbers, 1, str(tmp_path))
    assert loaded == saved
