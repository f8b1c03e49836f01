"""The heads, and the unembedding that they share."""

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
    for head, head_logits in zip(model.heads, logits, strict=True):
        torch.testing.assert_close(head_logits, model.unembedding(head(model.z(tokens))))
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def test_the_unembedding_is_a_norm_and_a_product():
    """The root mean square of (3, 4) is sqrt(12.5); the norm's weight doubles the second element."""
    unembedding = Unembedding(model_config(dim=2, num_attention_heads=1, norm_eps=1e-12), rows=3)
    with torch.no_grad():
        unembedding.norm.copy_(torch.tensor([1.0, 2.0]))
        unembedding.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    logits = unembedding(torch.tensor([[[3.0, 4.0]]]))
    root = math.sqrt(12.5)
    assert logits.flatten().tolist() == pytest.approx([3 / root, 8 / root, 11 / root])
    loss, nll = unembedding(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[2]]), scale=0.5)
    exponentials = [math.exp(numerator / root) for numerator in (3, 8, 11)]
    assert nll.item() == pytest.approx(-math.log(exponentials[2] / sum(exponentials)))
    assert loss.item() == pytest.approx(nll.item() / 2)


def test_an_unembedding_without_rows_or_norm_has_only_the_other():
    model = model_config()
    assert [name for name, _ in Unembedding(model, rows=0).named_parameters()] == ["norm"]
    assert [name for name, _ in Unembedding(model, rows=7, has_norm=False).named_parameters()] == ["weight"]


class UserHead(Head):
    """A user-defined head kind without decoding."""


def test_a_name_selects_a_built_in_or_a_user_defined_kind():
    assert head_class(model_config()) is ParallelHead
    assert head_class(model_config(head_kind=f"{__name__}:UserHead")) is UserHead
    names = " or ".join(HEAD_KINDS)
    with pytest.raises(InputError, match=rf"model\.head_kind=deep; expected {names}, or MODULE:CLASS of your own"):
        head_class(model_config(head_kind="deep"))


def test_decoding_with_a_kind_that_does_not_decode_raises_an_input_error():
    with pytest.raises(InputError, match="UserHead does not decode; expected a head kind with a method `extend`"):
        UserHead().extend(torch.zeros(1, 1, 32), None)
