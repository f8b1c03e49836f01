"""The final norm and the projection to the vocabulary."""

import math

import pytest
import torch

from megamtp.model.unembedding import Unembedding
from tests.models import model_config


def test_the_unembedding_is_a_norm_and_a_product():
    """The root mean square of (3, 4) is sqrt(12.5); the norm's weight doubles the second element."""
    unembedding = Unembedding(model_config(dim=2, num_attention_heads=1, norm_eps=1e-12), rows=3)
    with torch.no_grad():
        unembedding.norm.copy_(torch.tensor([1.0, 2.0]))
        unembedding.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    logits = unembedding(torch.tensor([[[3.0, 4.0]]]))
    root = math.sqrt(12.5)
    assert logits.flatten().tolist() == pytest.approx([3 / root, 8 / root, 11 / root])
    loss, nll, normed = unembedding(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[2]]), scale=0.5)
    exponentials = [math.exp(numerator / root) for numerator in (3, 8, 11)]
    assert nll.item() == pytest.approx(-math.log(exponentials[2] / sum(exponentials)))
    assert loss.item() == pytest.approx(nll.item() / 2)
    assert normed.flatten().tolist() == pytest.approx([3 / root, 8 / root])


def test_an_unembedding_without_rows_or_norm_has_only_the_other():
    model = model_config()
    assert [name for name, _ in Unembedding(model, rows=0).named_parameters()] == ["norm"]
    assert [name for name, _ in Unembedding(model, rows=7, has_norm=False).named_parameters()] == ["weight"]
