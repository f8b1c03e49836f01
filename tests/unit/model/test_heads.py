"""The heads, and the unembedding they share."""

import math

import pytest
import torch

from megamtp.errors import InputError
from megamtp.model.heads import HEAD_KINDS, Head, ParallelHead, Unembedding, head_class
from tests.models import built_model, model_config


def test_heads_read_the_same_z():
    model = built_model(model_config())
    tokens = torch.randint(50, (1, 6))
    logits = model.logits(tokens)
    for head, found in zip(model.heads, logits, strict=True):
        torch.testing.assert_close(found, model.unembedding(head(model.z(tokens))))
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def test_the_unembedding_is_a_norm_and_a_product():
    """(3, 4) over its root mean square, sqrt(12.5); the norm's weights double the second element."""
    unembedding = Unembedding(model_config(dim=2, num_attention_heads=1, norm_eps=1e-12), rows=3)
    with torch.no_grad():
        unembedding.norm.copy_(torch.tensor([1.0, 2.0]))
        unembedding.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    logits = unembedding(torch.tensor([[[3.0, 4.0]]]))
    root = math.sqrt(12.5)
    assert logits.flatten().tolist() == pytest.approx([3 / root, 8 / root, 11 / root])
    loss, nll = unembedding(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[2]]), scale=0.5)
    exponentials = [math.exp(each / root) for each in (3, 8, 11)]
    assert nll.item() == pytest.approx(-math.log(exponentials[2] / sum(exponentials)))
    assert loss.item() == pytest.approx(nll.item() / 2)


def test_a_stage_has_the_parameters_of_its_part_alone():
    model = model_config()
    assert [name for name, _ in Unembedding(model, rows=0).named_parameters()] == ["norm"]
    assert [name for name, _ in Unembedding(model, rows=7, has_norm=False).named_parameters()] == ["weight"]


class Own(Head):
    """A kind of a user's own, which does not decode."""


def test_a_kind_is_found_by_name():
    assert head_class(model_config()) is ParallelHead
    assert head_class(model_config(head_kind=f"{__name__}:Own")) is Own
    names = " or ".join(HEAD_KINDS)
    with pytest.raises(InputError, match=rf"model\.head_kind=deep; expected {names}, or MODULE:CLASS of your own"):
        head_class(model_config(head_kind="deep"))


def test_a_kind_that_cannot_decode_is_named():
    with pytest.raises(InputError, match="Own does not decode; expected a head kind with a method `extend`"):
        Own().extend(torch.zeros(1, 1, 32), None)
