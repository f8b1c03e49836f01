"""Several documents in one window: attention and positions are those of each document alone."""

import torch
from torch._dynamo.utils import counters

from megamtp.model import layers
from megamtp.model.documents import make_document_mask
from tests.models import built_model, model_config


def test_documents_in_one_window_do_not_influence_each_other():
    """In trunk and heads, a document has the same logits in any window as it has alone."""
    model, tokens = built_model(model_config()), torch.randint(50, (2, 12))
    documents = torch.tensor([[0] * 5 + [1] + [2] * 6, [3] * 12])
    mask = make_document_mask(documents, model.config, torch.float64, use_block_mask=False)
    z = model.z(tokens, mask)
    logits = torch.stack([model.unembedding(head(z, mask)) for head in model.heads])
    for row, first, last in ((0, 0, 5), (0, 5, 6), (0, 6, 12), (1, 0, 12)):
        torch.testing.assert_close(logits[:, row, first:last], model.logits(tokens[row : row + 1, first:last])[:, 0])
    assert (model.logits(tokens)[:, 0, 6:] - logits[:, 0, 6:]).abs().max() > 1e-3


@torch.no_grad()
def test_block_masks_equal_exact_masks_and_compile_once():
    """Tests the forward pass only: FlexAttention has no backward on CPUs (see tests/gpu/test_documents.py)."""
    config = model_config(num_key_value_heads=2)
    layer = built_model(config).trunk[0].float()
    counters.clear()
    compiled = torch.compile(layers.layer_output, dynamic=False, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x, documents = torch.randn(2, 20, 32), torch.randint(2, (2, 20)).cumsum(1)
        exact_mask, block_mask = (
            make_document_mask(documents, config, torch.float32, use_block_mask) for use_block_mask in (False, True)
        )
        output = compiled(x, layer.weights, block_mask.rotary, layer.head_dim, layer.eps, block_mask.attention)
        torch.testing.assert_close(output, layer(x, exact_mask), rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
