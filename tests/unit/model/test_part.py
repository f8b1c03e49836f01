"""Parts run one after another equal the whole model for any cut: losses, gradients and parameter names."""

import dataclasses
import itertools

import pytest
import torch

from megamtp.config import HeadLossConfig, ModelConfig
from megamtp.model.extent import Extent
from megamtp.model.heads import head_order
from megamtp.model.initial import initial_value
from megamtp.model.mtp import MTPModel
from megamtp.model.part import ModelPart, NumberedModules
from megamtp.targets import IGNORED
from tests.cases import HEAD_KINDS

MODEL = ModelConfig(
    dim=16, num_layers=5, num_future_tokens=3, num_attention_heads=4, num_key_value_heads=2, mlp_dim=24, vocab_size=53
)
SCALES = [0.02, 0.01, 0.03]
# Cuts of the two trunk layers and three heads.
CUTS = [[0, 1, 5], [0, 2, 5], [0, 3, 5], [0, 4, 5], [0, 1, 3, 5], [0, 2, 3, 4, 5]]


def model_of(kind: str, unembedding: str = "shared") -> ModelConfig:
    """Returns the model with heads of this kind, always with two trunk layers."""
    settings = HEAD_KINDS[kind] | {"unembedding": unembedding}
    return dataclasses.replace(MODEL, num_layers=3, match_parameters=False, **settings)


def extent(first: int, end: int, model: ModelConfig = MODEL) -> Extent:
    """Returns the extent of layers first, ..., end - 1, counted over the trunk and then the heads in their order."""
    heads = sorted(head_order(model)[max(first - 2, 0) : max(end - 2, 0)])
    extent_of_heads = range(heads[0], heads[-1] + 1) if heads else range(0)
    return Extent(range(min(first, 2), min(end, 2)), extent_of_heads, range(MODEL.vocab_size if heads else 0))


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (inputs, targets, the tokens after the inputs)."""
    tokens = torch.randint(MODEL.vocab_size, (2, 11), generator=torch.Generator().manual_seed(3))
    targets = torch.stack([tokens[:, 1 + head : 9 + head] for head in range(3)])
    targets[1, 0, ::3] = IGNORED
    return tokens[:, :8].contiguous(), targets, tokens[:, 8:10]


def initialised(part: ModelPart) -> ModelPart:
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            parameter.copy_(initial_value(name, tuple(parameter.shape), MODEL, seed=5) * 5)
    return part


@pytest.mark.parametrize("unembedding", ["shared", "replicated"])
@pytest.mark.parametrize("kind", HEAD_KINDS)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_parts_run_in_order_equal_the_model(cut, kind, unembedding):
    """Passes activations from part to part, and gradients back, as a pipeline's stages do.

    Heads that read tokens look them up in a copy of the embedding in each part that has such a head. Each part holds
    its heads' own unembeddings, or a copy of the shared one.
    """
    inputs, targets, following = batch()
    config, settings = model_of(kind, unembedding), HeadLossConfig(z_loss=1e-3, chunk_rows=5)
    if config.shares_chain_weights and 4 in cut:
        return  # engines keep heads that share their weights in one part
    model = initialised(MTPModel(config, settings, "deferred").double())
    loss, nll_sums = model(inputs, targets, SCALES, following=following)
    loss.backward()
    parts = [
        initialised(ModelPart(config, extent(*bounds, config), settings).double()) for bounds in itertools.pairwise(cut)
    ]
    received, results, part_nll_sums = [inputs], [], torch.zeros_like(nll_sums)
    for part in parts:
        x, embedded = received[-1], None
        if part.embedding is not None:
            embedded_inputs, embedded = part.embed(inputs, following)
            x = x if received[1:] else embedded_inputs
        x = part.run_trunk(x)
        if part.extent.heads:
            x, sums = part.run_heads(x, targets, SCALES, embedded=embedded)
            part_nll_sums[part.extent.heads.start : part.extent.heads.stop] += sums
        results.append(x)
        received.append(x.detach().requires_grad_())
    gradient = None  # the last part returns the loss, whose backward pass takes no gradient
    for result, part_input in zip(results[::-1], received[-2::-1], strict=True):
        result.backward(gradient)
        gradient = part_input.grad
    assert parts[-1].has_last_head and not any(part.has_last_head for part in parts[:-1])
    torch.testing.assert_close(part_nll_sums, nll_sums)
    gradients: dict[str, torch.Tensor] = {}
    if unembedding == "replicated":
        names = [name for part in parts for name, _ in part.named_parameters() if name.startswith("unembedding")]
        assert sorted(names) == [f"unembeddings.{index}.{name}" for index in range(3) for name in ("norm", "weight")]
    for part in parts:
        for name, parameter in part.named_parameters():
            gradients[name] = gradients.get(name, 0) + parameter.grad
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("unembedding", ["shared", "replicated"])
def test_slices_of_the_unembedding_equal_the_whole(unembedding):
    """Each slice computes some columns of the logits of every head; the part with the heads holds the final norms."""
    inputs, *_ = batch()
    config = model_of("parallel", unembedding)
    model = initialised(MTPModel(config).double())
    z = model.z(inputs)
    rows = [range(0, 20), range(20, 53)]
    slices = [
        with_rows_of(model, ModelPart(config, Extent(range(0), range(0), slice_rows, spread=True)).double())
        for slice_rows in rows
    ]
    heads = initialised(ModelPart(config, Extent(range(0), range(3), range(0), spread=True)).double())
    assert all(heads.unembedding_of(index).weight is None for index in range(3))
    assert all(part.unembedding_of(index).norm is None for part in slices for index in range(3))
    _, hidden_of_heads = heads.run_heads_without_losses(z)
    targets, expected = torch.full((16,), IGNORED), model.logits(inputs)
    for index, hidden in enumerate(hidden_of_heads):
        logits = [part.slice_statistics(index, hidden.flatten(0, 1), targets)[0] for part in slices]
        torch.testing.assert_close(torch.cat(logits, dim=1), expected[index].flatten(0, 1))


def with_rows_of(model: MTPModel, part: ModelPart) -> ModelPart:
    """Copies the model's unembedding rows to the part."""
    with torch.no_grad():
        for index in range(MODEL.num_future_tokens):
            rows = slice(part.extent.rows.start, part.extent.rows.stop)
            part.unembedding_weight(index).copy_(model.unembedding_weight(index)[rows])
    return part


def test_parameters_have_the_names_of_the_whole_model():
    part = ModelPart(MODEL, extent(1, 4))
    assert [
        name.split(".")[:2] for name in ("trunk.1.mlp.up.weight", "heads.0.mlp.up.weight", "heads.1.mlp.up.weight")
    ] == [name.split(".")[:2] for name, _ in part.named_parameters() if name.endswith("mlp.up.weight")]
    assert part.embedding is None and len(part.trunk) == 1 and len(part.heads) == 2
    assert isinstance(part.trunk, NumberedModules) and part.trunk[1] is next(iter(part.trunk))
    with pytest.raises(KeyError):
        part.trunk[0]
