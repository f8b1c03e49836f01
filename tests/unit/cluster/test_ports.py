"""Tests of the ports that are reserved for the ranks of a job."""

import socket

import pytest
import torch.distributed as dist

from megamtp.cluster.ports import reserve_port


def test_only_the_ranks_can_use_a_reserved_port():
    ports = {reserve_port() for _ in range(50)}
    assert len(ports) == 50
    for port in ports:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("", port))
    port = ports.pop()
    store = dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    dist.TCPStore("localhost", port, is_master=False).set("key", "value")
    assert store.get("key") == b"value"
