"""The model: parameter counts, initial weights, n = 1 as the ordinary model, recomputation, and decoding with a
cache.
"""

import math

import pytest
import torch
from torch._dynamo.utils import counters

from megamtp.config import HeadLossConfig, ModelConfig
from megamtp.model import layers
from megamtp.model.cost import layer_parameters, parameters
from megamtp.model.documents import separate
from megamtp.model.initial import initial_value
from megamtp.model.layers import TransformerLayer, rms_norm, rotary_tables, rotate
from megamtp.model.mtp import MTPModel


def small(**overrides) -> ModelConfig:
    settings = {
        "dim": 32,
        "num_layers": 5,
        "num_future_tokens": 2,
        "num_attention_heads": 4,
        "vocab_size": 50,
    } | overrides
    return ModelConfig(**settings)


def built(config: ModelConfig, **options) -> MTPModel:
    model = MTPModel(config, **options).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, config, seed=0) * (5 if parameter.dim() > 1 else 1))
    return model


@pytest.mark.parametrize("config", [small(), small(num_key_value_heads=2), small(num_future_tokens=1, mlp_dim=40)])
def test_cost_counts_the_parameters_that_exist(config):
    model = MTPModel(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters(config)
    assert sum(parameter.numel() for parameter in model.heads[0].parameters()) == layer_parameters(config)
    assert len(model.trunk) + len(model.heads) == config.num_layers


@pytest.mark.parametrize("size", [1.0, 1e-3])  # of the elements: with 1e-3, epsilon makes up most of the mean square
def test_rms_norm_against_its_formula(size):
    weight, x, eps = torch.randn(16, dtype=torch.float64), size * torch.randn(3, 16, dtype=torch.float64), 1e-5
    expected = torch.empty_like(x)
    for row in range(3):
        mean_square = sum(float(element) ** 2 for element in x[row]) / 16
        for column in range(16):
            expected[row, column] = x[row, column] * weight[column] / math.sqrt(mean_square + eps)
    torch.testing.assert_close(rms_norm(x, weight, eps), expected, rtol=1e-12, atol=0)


def test_rotation_depends_on_distance_alone():
    cos, sin = rotary_tables(20, 8, 10000.0, torch.device("cpu"), torch.float64)
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    products = [
        (
            rotate(query, cos[at : at + 1], sin[at : at + 1]) * rotate(key, cos[at + 3 : at + 4], sin[at + 3 : at + 4])
        ).sum()
        for at in (0, 7, 16)
    ]
    torch.testing.assert_close(torch.stack(products), products[0].expand(3), rtol=1e-6, atol=1e-7)


def test_a_position_sees_nothing_after_it():
    model = built(small())
    tokens = torch.randint(50, (2, 12))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 50
    before, after = model.logits(tokens), model.logits(changed)
    torch.testing.assert_close(before[:, :, :7], after[:, :, :7])
    assert (before[:, :, 7:] - after[:, :, 7:]).abs().min(dim=-1).values.max() > 1e-3


def test_documents_are_separate():
    """Trunk and heads: each document's logits are those it has alone, wherever it lies in the window."""
    model, tokens = built(small()), torch.randint(50, (2, 12))
    documents = torch.tensor([[0] * 5 + [1] + [2] * 6, [3] * 12])
    separation = separate(documents, model.config, torch.float64, in_blocks=False)
    z = model.z(tokens, separation)
    logits = torch.stack([model.unembedding(head(z, separation)) for head in model.heads])
    for row, first, last in ((0, 0, 5), (0, 5, 6), (0, 6, 12), (1, 0, 12)):
        torch.testing.assert_close(logits[:, row, first:last], model.logits(tokens[row : row + 1, first:last])[:, 0])
    assert (model.logits(tokens)[:, 0, 6:] - logits[:, 0, 6:]).abs().max() > 1e-3


@torch.no_grad()
def test_masks_in_blocks_are_the_same_mask_and_need_one_graph():
    """As on a GPU, but forward alone: FlexAttention has no backward on CPUs (tests/gpu/test_documents.py)."""
    config = small(num_key_value_heads=2)
    layer = built(config).trunk[0].float()
    counters.clear()
    compiled = torch.compile(layers.layer_output, dynamic=False, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x, documents = torch.randn(2, 20, 32), torch.randint(2, (2, 20)).cumsum(1)
        plain, blocks = (separate(documents, config, torch.float32, in_blocks) for in_blocks in (False, True))
        found = compiled(x, layer.weights, blocks.rotary, layer.head_dim, layer.eps, blocks.mask)
        torch.testing.assert_close(found, layer(x, plain), rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_grouped_queries_equal_repeated_key_value_heads():
    grouped, full = TransformerLayer(small(num_key_value_heads=2)).double(), TransformerLayer(small()).double()
    weights = grouped.state_dict()
    for name in ("attention.key.weight", "attention.value.weight"):
        weights[name] = weights[name].view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    for norm in ("attention_norm.weight", "mlp_norm.weight"):
        weights[norm] = torch.ones(32, dtype=torch.float64)
    full.load_state_dict(weights)
    grouped.load_state_dict({name: weight for name, weight in weights.items() if "norm" in name}, strict=False)
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    torch.testing.assert_close(grouped(x), full(x))


def test_heads_read_the_same_z():
    model = built(small())
    tokens = torch.randint(50, (1, 6))
    logits = model.logits(tokens)
    for head, found in zip(model.heads, logits, strict=True):
        torch.testing.assert_close(found, model.unembedding(head(model.z(tokens))))
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def test_recomputation_changes_no_gradient():
    config = small()
    tokens, targets = torch.randint(50, (2, 9)), torch.randint(50, (2, 2, 9))
    gradients = []
    for recompute in (False, True):
        model = built(config, recompute_trunk=recompute)
        model(tokens, targets, [0.1, 0.2])[0].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-12, atol=1e-15)


def test_cached_decoding_equals_the_whole_window():
    model = built(small(num_key_value_heads=2))
    tokens = torch.randint(50, (2, 12))
    whole = model.logits(tokens)[0]
    logits, caches = model.next_token_logits(tokens[:, :5], None)
    torch.testing.assert_close(logits, whole[:, 4])
    for position, length in ((5, 1), (6, 4), (10, 2)):
        logits, caches = model.next_token_logits(tokens[:, position : position + length], caches)
        torch.testing.assert_close(logits, whole[:, position + length - 1])


def test_initial_values_follow_seed_and_name_alone():
    config = small()
    value = initial_value("trunk.0.attention.query.weight", (32, 32), config, 0)
    assert torch.equal(value, initial_value("trunk.0.attention.query.weight", (32, 32), config, 0))
    assert not torch.equal(value, initial_value("trunk.1.attention.query.weight", (32, 32), config, 0))
    assert not torch.equal(value, initial_value("trunk.0.attention.query.weight", (32, 32), config, 1))


@pytest.mark.parametrize(
    ("name", "deviation"),
    [
        ("embedding.weight", 0.02),
        ("trunk.0.mlp.up.weight", 0.02),
        ("heads.1.mlp.down.weight", 0.02 / 10**0.5),
        ("trunk.0.attention.output.weight", 0.02 / 10**0.5),
    ],
)
def test_initial_standard_deviations(name, deviation):
    assert initial_value(name, (400, 400), small(), 0).std().item() == pytest.approx(deviation, rel=0.02)


def test_norms_start_at_one():
    assert torch.equal(initial_value("unembedding.norm", (32,), small(), 0), torch.ones(32))


def test_the_losses_options_reach_every_head():
    """Scales and z-loss against plain cross-entropy."""
    config = small()
    model = built(config, head_loss=HeadLossConfig(z_loss=0.01, chunk_rows=5))
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
    model = built(small(), recompute_trunk=recompute)
    model(torch.randint(50, (2, 9)), torch.randint(50, (2, 2, 9)), [0.1, 0.2])[0].backward()
    assert len(calls) == 5 + (3 if recompute else 0)
