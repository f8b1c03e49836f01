"""Memory between variants: large tensors are freed. What the variants measure needs a GPU."""

import torch
from benchmarks import variants


def test_large_tensors_lose_their_memory(monkeypatch):
    monkeypatch.setattr(variants.torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(
        variants, "storages", lambda: {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    )
    small, large, other = tensors = [torch.ones(size) for size in (10, variants.LARGE // 4, variants.LARGE // 4)]
    variants.free(others={other.data_ptr()})
    assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [40, 0, variants.LARGE]
    assert small.sum() == 10 and other.sum() == variants.LARGE // 4 and large.shape == other.shape
