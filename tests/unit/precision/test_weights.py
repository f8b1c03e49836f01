"""Quantised weights: one scale per group, from all of its weights."""

import pytest
import torch

from megamtp.config import HeadLossConfig, ModelConfig
from megamtp.model.layers import LayerOptions
from megamtp.model.mtp import MTPModel
from megamtp.precision.operations import E4M3, quantise
from megamtp.precision.weights import WeightGroup, WeightQuantiser, quantiser_of


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_groups_have_scales_of_their_own():
    weights = [_random(16, 32), 3 * _random(8, 32, seed=1), 0.01 * _random(48, 16, seed=2)]
    groups = [WeightGroup(("query", "key")), WeightGroup(("output",))]
    quantiser = quantiser_of([(groups[0], weights[:2]), (groups[1], weights[2:])])
    quantiser.update()
    for group, members in zip(groups, (weights[:2], weights[2:]), strict=True):
        matrix, scale = quantise(torch.cat(members))
        assert len(group.quantised.matrices) == 1
        assert torch.equal(group.quantised.matrices[0].float(), matrix.float())
        assert torch.equal(group.quantised.scale, scale)


def test_an_update_keeps_the_tensors_that_layers_have_saved():
    weight, group = _random(16, 16), WeightGroup(("output",))
    quantiser = quantiser_of([(group, [weight])])
    quantiser.update()
    matrix, scale = group.quantised.matrices[0], group.quantised.scale
    before = matrix.float().clone()
    weight[3] *= 5
    quantiser.update()
    expected, expected_scale = quantise(weight)
    assert torch.equal(matrix.float(), expected.float()) and torch.equal(scale, expected_scale)
    assert not torch.equal(matrix.float(), before)


def test_ranks_agree_on_scales():
    """The second source is empty, as the last ranks' shards may be."""
    sources, targets = [_random(32), _random(0)], [torch.zeros(32, dtype=E4M3), torch.zeros(0, dtype=E4M3)]
    quantiser = WeightQuantiser(sources, targets, [0, 1], torch.device("cpu"))
    quantiser.update(lambda amax: amax.copy_(torch.maximum(amax, torch.tensor([448.0, 7.0]))))
    assert [scale.item() for scale in quantiser.scales] == [1.0, 7.0 / 448]
    assert torch.equal(targets[0].float(), sources[0].to(E4M3).float())
    assert quantiser.scales[1].data_ptr() % 16 == quantiser.scales[0].data_ptr() % 16  # cuBLAS needs multiples of 16


def test_layers_refuse_to_run_with_weights_that_were_never_quantised():
    config = ModelConfig(dim=32, num_layers=2, num_future_tokens=1, num_attention_heads=2, vocab_size=32)
    model = MTPModel(config, HeadLossConfig(), options=LayerOptions(float8=True)).bfloat16()
    with pytest.raises(AssertionError, match="weights are not quantised"):
        model(torch.zeros(1, 16, dtype=torch.long), torch.zeros(1, 1, 16, dtype=torch.long), [1.0])
