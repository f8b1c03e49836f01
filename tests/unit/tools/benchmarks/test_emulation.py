"""Configurations of emulated ranks and of real ones, and the settings that results name."""

import os

import pytest
from benchmarks import emulation, output, overhead, world

from megamtp.errors import InputError
from tests.measurements import options


def test_a_launchers_ranks_are_real(tmp_path, monkeypatch):
    """No emulation, one table, and no benchmark that one process must make."""
    monkeypatch.setattr(os, "environ", os.environ | {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4"})
    given = options(tmp_path)
    found = emulation.config("1.3b", 4, emulation.num_ranks(64), given)
    assert found.cluster.emulate is None and found.train.global_batch_tokens == 4 * 2 * 4096
    assert emulation.settings(found, given) == {"network": "NCCL", "T": 4096, "micro-batches": 1}
    output.write(given, {}, [], "table", output.figure(2, 2)[0])
    assert not list(tmp_path.iterdir())  # rank 0 writes
    for module, arguments in ((world, []), (overhead, ["--sizes", "0.3b", "--cold"]), (overhead, [])):
        with pytest.raises(
            InputError,
            match=r"under a launcher of 4 ranks; expected one (process: |size and no --cold, or one process$)",
        ):
            module.main(arguments)


def test_settings_tell_the_network(tmp_path):
    """What test_planner.py gives back to the planner, and nothing that was not set."""
    flat = options(tmp_path)
    assert emulation.settings(emulation.config("1.3b", 4, 512, flat), flat) == {
        "bandwidth": "1e+11",
        "latency": "2e-05",
        "SMs held": 1,
        "T": 4096,
        "micro-batches": 1,
    }
    nodes = options(
        tmp_path, "--bandwidth", "null", "--sms", "16", "--micro-batches", "3", "--set", "cluster.latency=0"
    )
    config = emulation.config("0.3b", 1, 64, nodes)
    assert (config.cluster.emulate, config.global_batch_windows, config.cluster.latency) == (64, 64 * 4 * 3, 0.0)
    assert emulation.settings(config, nodes) == {
        "bandwidth": "null",
        "in nodes": "3.6e+11",
        "between nodes": "5e+10",
        "latency": "0",
        "SMs held": 16,
        "T": 4096,
        "micro-batches": 3,
        "set": "cluster.latency=0",
    }
