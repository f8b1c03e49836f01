"""Large tensors are freed between variants. The measurements of variants need a GPU."""

import torch
from benchmarks import variants


def test_free_releases_large_tensors(monkeypatch):
    monkeypatch.setattr(variants.torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(
        variants, "storages", lambda: {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    )
    small, large, kept = tensors = [torch.ones(size) for size in (10, variants.LARGE // 4, variants.LARGE // 4)]
    variants.free(kept={kept.data_ptr()})
    assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [40, 0, variants.LARGE]
    assert small.sum() == 10 and kept.sum() == variants.LARGE // 4 and large.shape == kept.shape
