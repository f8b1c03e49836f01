"""Several documents in one window: attention and positions are those of each document alone."""

import torch
from torch._dynamo.utils import counters

from megamtp.model import layers
from megamtp.model.documents import make_document_mask
from tests.models import built_model, model_config


def test_documents_are_separate():
    """Trunk and heads: each document's logits are those it has alone, wherever it lies in the window."""
    model, tokens = built_model(model_config()), torch.randint(50, (2, 12))
    documents = torch.tensor([[0] * 5 + [1] + [2] * 6, [3] * 12])
    mask = make_document_mask(documents, model.config, torch.float64, use_block_mask=False)
    z = model.z(tokens, mask)
    logits = torch.stack([model.unembedding(head(z, mask)) for head in model.heads])
    for row, first, last in ((0, 0, 5), (0, 5, 6), (0, 6, 12), (1, 0, 12)):
        torch.testing.assert_close(logits[:, row, first:last], model.logits(tokens[row : row + 1, first:last])[:, 0])
    assert (model.logits(tokens)[:, 0, 6:] - logits[:, 0, 6:]).abs().max() > 1e-3


@torch.no_grad()
def test_masks_in_blocks_are_the_same_mask_and_need_one_graph():
    """As on a GPU, but forward alone: FlexAttention has no backward on CPUs (tests/gpu/test_documents.py)."""
    config = model_config(num_key_value_heads=2)
    layer = built_model(config).trunk[0].float()
    counters.clear()
    compiled = torch.compile(layers.layer_output, dynamic=False, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x, documents = torch.randn(2, 20, 32), torch.randint(2, (2, 20)).cumsum(1)
        plain, blocks = (make_document_mask(documents, config, torch.float32, blocks) for blocks in (False, True))
        found = compiled(x, layer.weights, blocks.rotary, layer.head_dim, layer.eps, blocks.attention)
        torch.testing.assert_close(found, layer(x, plain), rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
