"""FlexAttention on a GPU: output and gradients equal those of the exact mask; compiled once for all batches.

Run with: bash launch/test.sh tests/gpu
"""

import pytest
import torch

from megamtp.config import ModelConfig
from tests.ranks import run_gpu_rank
from tests.reference import relative_error

pytestmark = pytest.mark.gpu

# fp32 without TF32: rounding at 2^-24 in sums of some hundred terms, and FlexAttention's exp2. bf16: as in
# tests/distributed/test_gradients.py.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.04}


def _errors_and_graphs() -> tuple[dict[torch.dtype, float], int]:
    """Compares outputs and gradients with those of the exact mask in float64.

    Returns:
        (largest relative error by dtype, number of graphs compiled).
    """
    from torch._dynamo.utils import counters

    from megamtp.model.documents import make_document_mask
    from megamtp.model.layers import LayerOptions, TransformerLayer

    model = ModelConfig(dim=128, num_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=9, mlp_dim=256)
    errors = dict.fromkeys(BOUNDS, 0.0)
    for dtype in BOUNDS:
        exact = TransformerLayer(model).cuda().double()
        for parameter in exact.parameters():
            torch.nn.init.normal_(parameter, std=0.1) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
        compiled = TransformerLayer(model, LayerOptions(compiled=True)).cuda().to(dtype)
        compiled.load_state_dict(exact.state_dict())
        exact.load_state_dict(compiled.state_dict())  # so that both have the same rounded weights
        for _ in range(3):
            x = torch.randn(2, 300, 128, device="cuda").to(dtype)
            documents = (torch.rand(2, 300, device="cuda") < 0.02).long().cumsum(1)
            results = []
            for layer, use_block_mask in ((exact, False), (compiled, True)):
                layer.zero_grad()
                layer_input = x.to(layer.mlp_norm.weight.dtype, copy=True).requires_grad_()
                mask = make_document_mask(documents, model, layer_input.dtype, use_block_mask)
                output = layer(layer_input, mask)
                output.square().mean().backward()
                gradients = [parameter.grad for parameter in layer.parameters()]
                results.append([output.detach(), layer_input.grad, *gradients])
            errors[dtype] = max(
                errors[dtype], *(relative_error(actual, expected) for expected, actual in zip(*results, strict=True))
            )
    return errors, counters["stats"]["unique_graphs"]


def test_block_masks_equal_exact_masks_and_compile_once():
    errors, graphs = run_gpu_rank(_errors_and_graphs)
    for dtype, bound in BOUNDS.items():
        assert errors[dtype] < bound
    assert graphs == len(BOUNDS)
