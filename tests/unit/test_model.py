"""The model: its layers, causality, documents, initial weights, recomputation, and decoding with a cache."""

import math

import pytest
import torch
from torch._dynamo.utils import counters

from megamtp.config import HeadLossConfig, ModelConfig
from megamtp.model import layers
from megamtp.model.cost import layer_parameters, parameters
from megamtp.model.documents import make_document_mask
from megamtp.model.initial import initial_value
from megamtp.model.layers import TransformerLayer, rms_norm, rotary_tables, rotate
from megamtp.model.mtp import MTPModel


def model_config(**overrides) -> ModelConfig:
    settings = {
        "dim": 32,
        "num_layers": 5,
        "num_future_tokens": 2,
        "num_attention_heads": 4,
        "vocab_size": 50,
    } | overrides
    return ModelConfig(**settings)


def build_model(config: ModelConfig, **options) -> MTPModel:
    """Returns a float64 model with initial weights, of which matrices are 5 times as large as in training."""
    model = MTPModel(config, **options).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, config, seed=0) * (5 if parameter.dim() > 1 else 1))
    return model


@pytest.mark.parametrize("settings", [{}, {"num_key_value_heads": 2}, {"num_future_tokens": 1, "mlp_dim": 40}])
def test_cost_counts_all_parameters(settings):
    config = model_config(**settings)
    model = MTPModel(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters(config)
    assert sum(parameter.numel() for parameter in model.heads[0].parameters()) == layer_parameters(config)
    assert len(model.trunk) + len(model.heads) == config.num_layers


@pytest.mark.parametrize("magnitude", [1.0, 1e-3])  # with 1e-3, epsilon dominates the mean square
def test_rms_norm_follows_its_formula(magnitude):
    weight, x, eps = torch.randn(16, dtype=torch.float64), magnitude * torch.randn(3, 16, dtype=torch.float64), 1e-5
    expected = torch.empty_like(x)
    for row in range(3):
        mean_square = sum(float(element) ** 2 for element in x[row]) / 16
        for column in range(16):
            expected[row, column] = x[row, column] * weight[column] / math.sqrt(mean_square + eps)
    torch.testing.assert_close(rms_norm(x, weight, eps), expected, rtol=1e-12, atol=0)


def test_rotary_scores_depend_only_on_the_distance():
    cos, sin = rotary_tables(20, 8, 10000.0, torch.device("cpu"), torch.float64)
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    scores = []
    for position in (0, 7, 16):
        rotated_query = rotate(query, cos[position : position + 1], sin[position : position + 1])
        rotated_key = rotate(key, cos[position + 3 : position + 4], sin[position + 3 : position + 4])
        scores.append((rotated_query * rotated_key).sum())
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(3), rtol=1e-6, atol=1e-7)


def test_a_position_does_not_depend_on_later_tokens():
    model = build_model(model_config())
    tokens = torch.randint(50, (2, 12))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 50
    before, after = model.logits(tokens), model.logits(changed)
    torch.testing.assert_close(before[:, :, :7], after[:, :, :7])
    assert (before[:, :, 7:] - after[:, :, 7:]).abs().min(dim=-1).values.max() > 1e-3


def test_documents_in_one_window_do_not_influence_each_other():
    """In trunk and heads, a document has the same logits in any window as it has alone."""
    model, tokens = build_model(model_config()), torch.randint(50, (2, 12))
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
    layer = build_model(config).trunk[0].float()
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


def test_grouped_queries_equal_repeated_key_value_heads():
    grouped = TransformerLayer(model_config(num_key_value_heads=2)).double()
    full = TransformerLayer(model_config()).double()
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
    model = build_model(model_config())
    tokens = torch.randint(50, (1, 6))
    logits = model.logits(tokens)
    for head, head_logits in zip(model.heads, logits, strict=True):
        torch.testing.assert_close(head_logits, model.unembedding(head(model.z(tokens))))
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def test_recomputation_changes_no_gradient():
    config = model_config()
    tokens, targets = torch.randint(50, (2, 9)), torch.randint(50, (2, 2, 9))
    gradients = []
    for recompute in (False, True):
        model = build_model(config, recompute_trunk=recompute)
        model(tokens, targets, [0.1, 0.2])[0].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-12, atol=1e-15)


def test_cached_decoding_equals_decoding_of_the_whole_window():
    model = build_model(model_config(num_key_value_heads=2))
    tokens = torch.randint(50, (2, 12))
    expected = model.logits(tokens)[0]
    logits, caches = model.next_token_logits(tokens[:, :5], None)
    torch.testing.assert_close(logits, expected[:, 4])
    for position, length in ((5, 1), (6, 4), (10, 2)):
        logits, caches = model.next_token_logits(tokens[:, position : position + length], caches)
        torch.testing.assert_close(logits, expected[:, position + length - 1])


def test_initial_values_depend_only_on_seed_and_name():
    config = model_config()
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
    assert initial_value(name, (400, 400), model_config(), 0).std().item() == pytest.approx(deviation, rel=0.02)


def test_norms_start_at_one():
    assert torch.equal(initial_value("unembedding.norm", (32,), model_config(), 0), torch.ones(32))


def test_loss_options_apply_to_every_head():
    """Compares scales and z-loss with plain cross-entropy."""
    config = model_config()
    model = build_model(config, head_loss=HeadLossConfig(z_loss=0.01, chunk_rows=5))
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
    model = build_model(model_config(), recompute_trunk=recompute)
    model(torch.randint(50, (2, 9)), torch.randint(50, (2, 2, 9)), [0.1, 0.2])[0].backward()
    assert len(calls) == 5 + (3 if recompute else 0)
