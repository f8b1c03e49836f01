"""Configurations of emulated and of real ranks, and the settings in result files."""

import os

import pytest
from benchmarks import emulation, output, overhead, world

from megamtp.errors import InputError
from tests.measurements import options


def test_ranks_of_a_launcher_are_not_emulated(tmp_path, monkeypatch):
    """Only rank 0 writes files. Benchmarks that need a single process refuse to run."""
    monkeypatch.setattr(os, "environ", os.environ | {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4"})
    parsed = options(tmp_path)
    config = emulation.config("1.3b", 4, emulation.num_ranks(64), parsed)
    assert config.cluster.emulate is None and config.train.global_batch_tokens == 4 * 2 * 4096
    assert emulation.settings(config, parsed) == {"network": "NCCL", "T": 4096, "micro-batches": 1}
    output.write(parsed, {}, [], "table", output.figure(2, 2)[0])
    assert not list(tmp_path.iterdir())  # rank 0 writes
    for module, arguments in ((world, []), (overhead, ["--sizes", "0.3b", "--cold"]), (overhead, [])):
        with pytest.raises(
            InputError,
            match=r"under a launcher of 4 ranks; expected one (process: |size and no --cold, or one process$)",
        ):
            module.main(arguments)


def test_settings_describe_the_network(tmp_path):
    """Settings have the values that the planner's tests read, and nothing that was not set."""
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
