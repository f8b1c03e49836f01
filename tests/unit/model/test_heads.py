"""The kinds of heads."""

import pytest
import torch

from megamtp.errors import InputError
from megamtp.model.head import Head
from megamtp.model.heads import HEAD_KINDS, ParallelHead, head_class
from tests.models import built_model, model_config


def test_heads_read_the_same_z():
    model = built_model(model_config())
    tokens = torch.randint(50, (1, 6))
    logits = model.logits(tokens)
    for head, head_logits in zip(model.heads, logits, strict=True):
        torch.testing.assert_close(head_logits, model.unembedding(head(model.z(tokens))))
    assert (logits[0] - logits[1]).abs().max() > 1e-2


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
