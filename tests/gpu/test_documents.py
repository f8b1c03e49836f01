"""FlexAttention on a GPU: forward and backward as with the exact mask, one compiled function for all batches.

Run with: bash launch/test.sh tests/gpu
"""

import pytest
import torch

from megamtp.config import ModelConfig
from tests.ranks import run_gpu_rank
from tests.reference import relative_error

pytestmark = pytest.mark.gpu

# fp32 without TF32: roundings at 2^-24 over sums of some hundred terms, and FlexAttention's exp2. bf16: as in
# test_gradients.py.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.04}


def _errors_and_graphs() -> tuple[dict[torch.dtype, float], int]:
    """Largest error of the output and of any gradient against float64 with the exact mask; graphs compiled for each
    dtype.
    """
    from torch._dynamo.utils import counters

    from megamtp.model.documents import separate
    from megamtp.model.layers import TransformerLayer

    model = ModelConfig(dim=128, num_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=9, mlp_dim=256)
    errors = dict.fromkeys(BOUNDS, 0.0)
    for dtype in BOUNDS:
        exact = TransformerLayer(model).cuda().double()
        for parameter in exact.parameters():
            torch.nn.init.normal_(parameter, std=0.1) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
        compiled = TransformerLayer(model, compiled=True).cuda().to(dtype)
        compiled.load_state_dict(exact.state_dict())
        exact.load_state_dict(compiled.state_dict())  # rounded alike
        for _ in range(3):
            x = torch.randn(2, 300, 128, device="cuda").to(dtype)
            documents = (torch.rand(2, 300, device="cuda") < 0.02).long().cumsum(1)
            results = []
            for layer, in_blocks in ((exact, False), (compiled, True)):
                layer.zero_grad()
                own = x.to(layer.mlp_norm.weight.dtype, copy=True).requires_grad_()
                output = layer(own, separate(documents, model, own.dtype, in_blocks))
                output.square().mean().backward()
                results.append([output.detach(), own.grad, *(parameter.grad for parameter in layer.parameters())])
            errors[dtype] = max(
                errors[dtype], *(relative_error(found, expected) for expected, found in zip(*results, strict=True))
            )
    return errors, counters["stats"]["unique_graphs"]


def test_blocks_equal_the_exact_mask_and_compile_once():
    errors, graphs = run_gpu_rank(_errors_and_graphs)
    for dtype, bound in BOUNDS.items():
        assert errors[dtype] < bound
    assert graphs == len(BOUNDS)
