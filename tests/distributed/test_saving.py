"""Saving in the background: what is saved is the state at its beginning, and one rank's full disk is every rank's
error.
"""

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


def _saved_while_training(directory: str) -> tuple[dict[str, Tensor], list[tuple[bool, int]], float]:
    """(first weights; after each step whether this rank has written and how many are visible; seconds of the copy)."""
    from megamtp.engines.zero import ZeroEngine
    from megamtp.training import saving

    config, may_write, reported = small_config(engine__kind="zero3", run__directory=directory), threading.Event(), []
    engine, write_shard = ZeroEngine(config), saving.write_shard

    class Metrics(NoMetrics):
        def checkpoint(self, *record) -> None:
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


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    results = run_ranks(_saved_while_training, 2, str(tmp_path))
    (checkpoint,) = store.checkpoints(tmp_path)
    _, weights = load_weights(checkpoint)
    for before, seen, copy_seconds in results:
        assert seen == [(False, 0), (False, 0), (False, 1)]
        assert all(torch.equal(weights[name], value) for name, value in before.items())
        assert 0 < copy_seconds < 5


def _failure_of_rank_1(directory: str, error: Exception) -> str:
    """The error of this rank when rank 1 meets `error` while it writes a second checkpoint."""
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
    with pytest.raises(CheckpointError) as found:
        saver.finish()
    return str(found.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            "(No space left on device); make room on its disk, and start",
        ),
        (OSError(errno.EACCES, os.strerror(errno.EACCES)), "(Permission denied); change its permissions"),
        (RuntimeError("a defect"), "(a defect); see to the disk, and start"),
    ],
)
def test_whatever_befalls_one_rank_is_every_ranks_error(error, words, tmp_path):
    first, second = run_ranks(_failure_of_rank_1, 2, str(tmp_path), error)
    assert first == second
    assert f"step-0000002 cannot be written {words}" in first
    (checkpoint,) = store.checkpoints(tmp_path)
    assert store.verify(checkpoint).step == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [checkpoint.name]


def _small_disk(directory: str) -> tuple[str, bool]:
    """(the error of this rank, whether anything was written) on a disk with room for either rank's part, but not for
    both.
    """
    from megamtp.engines.zero import ZeroEngine
    from megamtp.training import saving

    config = small_config(engine__kind="zero3", run__directory=directory)
    engine, written = ZeroEngine(config), []
    size = sum(tensor.numel() * tensor.element_size() for tensor in engine.state().tensors.values())
    shutil.disk_usage = lambda path: namedtuple("Usage", "free")(size * 3 // 2)
    saving.write_shard = lambda *arguments: written.append(arguments)
    with pytest.raises(CheckpointError) as found:
        saving.Saver(config, engine, NoMetrics()).begin(1, {})
    return str(found.value), bool(written)


def test_there_must_be_room_for_the_parts_of_all_ranks(tmp_path):
    first, second = run_ranks(_small_disk, 2, str(tmp_path))
    assert first == second
    assert "step-0000001 cannot be written (it needs " in first[0] and not first[1]
    assert list((tmp_path / "checkpoints").iterdir()) == []


def _folder_of_each_rank(directory: str) -> str:
    """The error of this rank when every rank has a run directory of its own."""
    from megamtp.engines.zero import ZeroEngine

    config = small_config(engine__kind="zero3", run__directory=f"{directory}/{dist.get_rank()}")
    with pytest.raises(CheckpointError) as found:
        save(config, ZeroEngine(config), 1)
    return str(found.value)


def test_a_run_directory_that_nodes_do_not_share_is_noticed(tmp_path):
    first, second = run_ranks(_folder_of_each_rank, 2, str(tmp_path))
    assert first == second
    assert (
        "0/checkpoints/step-0000001.partial/shard-00001.safetensors is missing" in first
        and "let all nodes share" in first
    )
    assert list((tmp_path / "0/checkpoints").iterdir()) == []


def _loss_scale_and_random_numbers(directory: str) -> list[tuple]:
    """(fp16's loss scaler, the next random numbers) when they were saved, and when they are loaded."""
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
