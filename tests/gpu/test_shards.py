"""Copies for checkpoints into page-locked memory, and what a refusal of it leaves behind."""

import pytest
import torch

from megamtp.checkpoint import shards

pytestmark = pytest.mark.gpu


def test_a_refusal_to_page_lock_leaves_no_error_for_the_next_kernel():
    buffer = torch.empty(2**20, dtype=torch.uint8)
    assert shards.page_lock(buffer)
    assert not shards.page_lock(buffer)  # it is already
    assert torch.ones(3, device="cuda").sum().item() == 3


def test_memory_that_was_page_locked_is_ordinary_again_when_it_is_freed():
    """The same address, registered again: what a snapshot that grows, and the tensors after it, may get."""
    places = set()
    for _ in range(4):
        buffer = torch.empty(64 * 2**20, dtype=torch.uint8)
        places.add(buffer.data_ptr())
        assert shards.page_lock(buffer)
        del buffer
    assert len(places) < 4  # the allocator gave an address twice, so the test means something
    for size in (2**20, 2**22, 2**24):
        assert torch.ones(size).cuda().sum().item() == size
    snapshot = shards.Snapshot()
    for size in (2**20, 2**22, 2**21):
        assert torch.equal(snapshot.copy({"a": torch.full((size,), 3.0, device="cuda")})["a"], torch.full((size,), 3.0))


def test_copies_in_pageable_memory_are_as_good(monkeypatch, capsys):
    monkeypatch.setattr(shards, "page_lock", lambda buffer: False)
    tensors = {"a": torch.arange(5.0, device="cuda"), "b": torch.arange(3, device="cuda")}
    copies = shards.Snapshot().copy(tensors)
    assert all(torch.equal(copies[name], tensor.cpu()) for name, tensor in tensors.items())
    assert "cannot be page-locked: copies for checkpoints take longer; raise ulimit -l" in capsys.readouterr().err
