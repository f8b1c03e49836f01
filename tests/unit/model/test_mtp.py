"""The whole model: causality, heads and their losses, recomputation, and decoding with a cache."""

import pytest
import torch

from megamtp.config import HeadLossConfig
from megamtp.model import layers
from megamtp.model.layers import LayerOptions
from tests.models import built_model, model_config


def test_a_position_does_not_depend_on_later_tokens():
    model = built_model(model_config())
    tokens = torch.randint(50, (2, 12))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 50
    before, after = model.logits(tokens), model.logits(changed)
    torch.testing.assert_close(before[:, :, :7], after[:, :, :7])
    assert (before[:, :, 7:] - after[:, :, 7:]).abs().min(dim=-1).values.max() > 1e-3


def test_recomputation_changes_no_gradient():
    config = model_config()
    tokens, targets = torch.randint(50, (2, 9)), torch.randint(50, (2, 2, 9))
    gradients = []
    for recompute in (False, True):
        model = built_model(config, options=LayerOptions(recompute=recompute))
        model(tokens, targets, [0.1, 0.2])[0].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("unembedding", ["shared", "replicated"])
def test_cached_decoding_equals_decoding_of_the_whole_window(unembedding):
    model = built_model(model_config(num_key_value_heads=2, unembedding=unembedding))
    tokens = torch.randint(50, (2, 12))
    expected = model.logits(tokens)[0]
    logits, caches = model.next_token_logits(tokens[:, :5], None)
    torch.testing.assert_close(logits, expected[:, 4])
    for position, length in ((5, 1), (6, 4), (10, 2)):
        logits, caches = model.next_token_logits(tokens[:, position : position + length], caches)
        torch.testing.assert_close(logits, expected[:, position + length - 1])


def test_loss_options_apply_to_every_head():
    """Compares scales and z-loss with plain cross-entropy."""
    config = model_config()
    model = built_model(config, head_loss=HeadLossConfig(z_loss=0.01, chunk_rows=5))
    tokens, targets = torch.randint(50, (2, 9)), torch.randint(50, (2, 2, 9))
    loss, nll_sums = model(tokens, targets, [0.3, 0.7])
    expected = 0.0
    for scale, logits, head_targets, nll in zip([0.3, 0.7], model.logits(tokens), targets, nll_sums, strict=True):
        cross_entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), head_targets.flatten(), reduction="sum")
        expected += scale * (cross_entropy + 0.01 * logits.logsumexp(-1).square().sum())
        torch.testing.assert_close(nll, cross_entropy)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("recompute", [False, True])
def test_only_trunk_layers_are_recomputed(recompute, monkeypatch):
    calls = []
    original = layers.layer_output
    monkeypatch.setattr(layers, "layer_output", lambda *arguments: calls.append(1) or original(*arguments))
    model = built_model(model_config(), options=LayerOptions(recompute=recompute))
    model(torch.randint(50, (2, 9)), torch.randint(50, (2, 2, 9)), [0.1, 0.2])[0].backward()
    assert len(calls) == 5 + (3 if recompute else 0)
