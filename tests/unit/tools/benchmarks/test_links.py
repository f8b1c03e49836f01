"""Latency and bandwidth are recovered from computed times; collectives are queued before they start."""

import dataclasses
from unittest.mock import Mock, create_autospec

import pytest
import torch
from benchmarks import links

from megamtp.cluster.network import Network
from megamtp.config import ClusterConfig, EfficiencyConfig


def test_fit_recovers_latency_and_bandwidth():
    """The times are those of an emulated network."""
    efficiency = EfficiencyConfig(reduce_scatter=0.9, all_reduce=1.25)
    cluster = ClusterConfig(emulate=2, latency=30e-6, flat_bandwidth=150e9, efficiency=efficiency)
    network = Network(cluster)
    times = {kind: {size: network.seconds(kind, size) for size in links.SIZES} for kind in links.KINDS}
    fitted = links.fit(times, world_size=2).cluster
    assert fitted.latency == pytest.approx(30e-6, rel=1e-3)
    assert fitted.flat_bandwidth == pytest.approx(150e9, rel=1e-3)
    assert dataclasses.asdict(fitted.efficiency) == pytest.approx(dataclasses.asdict(efficiency), rel=1e-3)


def test_collectives_are_queued_behind_a_hold(monkeypatch):
    """The kernels are mocks with the signatures of the real kernels."""
    mark, hold, call = create_autospec(links.mark, side_effect=lambda time: time), create_autospec(links.hold), Mock()
    zeros = torch.zeros
    monkeypatch.setattr(links, "mark", mark)
    monkeypatch.setattr(links, "hold", hold)
    monkeypatch.setattr(links, "_collective", Mock(return_value=call))
    monkeypatch.setattr(links.dist, "barrier", Mock())
    monkeypatch.setattr(links.torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))
    monkeypatch.setattr(links, "find_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(links, "record_time", Mock(side_effect=[0.0, 20e-3] * 3))
    monkeypatch.setattr(links, "synchronize", create_autospec(links.synchronize))
    assert links._seconds("all_gather", 4096, rounds=3) == pytest.approx(20e-3 / links.REPEATS)
    assert call.call_count == 3 + 3 * links.REPEATS
    (time,), _ = mark.call_args
    assert (time.shape, time.dtype) == ((1,), torch.int64)
    hold.assert_called_with(time, links.QUEUE_SECONDS, num_sms=1)
