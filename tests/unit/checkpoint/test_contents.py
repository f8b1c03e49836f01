"""Contents of checkpoints: checks of tensors and models, available state, and rearranged tensors."""

import dataclasses
from pathlib import Path

import pytest
import torch

from megamtp.checkpoint.contents import (
    Contents,
    Rearranged,
    Rows,
    check_model,
    check_tensors,
    model_from_fields,
    parameter_shapes,
    positive_integer,
    rename_tensors,
    require_head_kinds,
    resolve_defaults,
)
from megamtp.checkpoint.tensors import InMemory
from megamtp.config import ModelConfig
from megamtp.errors import CheckpointError
from tests.checkpoints import SMALL, random_model, with_moments


def test_rearranged_rows_are_read_by_slices():
    source = InMemory({"a": torch.arange(24.0).view(6, 2, 2), "b": torch.arange(5.0)})
    rows = torch.tensor([4, 5, 0, 1, 3])
    rearranged = Rearranged(source, {"x": Rows("a", rows), "y": Rows("b")})
    assert rearranged.shapes == {"x": (5, 2, 2), "y": (5,)}
    expected = source.weights["a"][rows].flatten()
    for start in range(len(expected) + 1):
        for end in (*range(start, len(expected) + 1), None):
            assert torch.equal(rearranged.read("x", start, end), expected[start:end])
    assert torch.equal(rearranged.read("y", 1, 3), torch.tensor([1.0, 2.0]))


def test_renamed_tensor():
    source = rename_tensors(InMemory({"theirs": torch.arange(6.0).view(2, 3)}), {"ours": "theirs"})
    assert source.shapes == {"ours": (2, 3)} and source.read("ours", 2, 4).tolist() == [2.0, 3.0]


def test_parameter_shapes_equal_those_of_the_model():
    model = random_model(SMALL)
    assert parameter_shapes(SMALL) == {name: tuple(each.shape) for name, each in model.named_parameters()}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"a": (2, 3)}, "where has no tensor b; expected one of shape [4]"),
        ({"a": (3, 2), "b": (4,)}, "where: tensor a has shape [3, 2], expected [2, 3]"),
        (
            {"a": (2, 3), "b": (4,), "c": (1,)},
            "where has an unknown tensor c; expected only the 2 tensors of its configuration",
        ),
    ],
)
def test_missing_misshaped_and_unknown_tensors_are_refused(shapes, message):
    expected = {"a": (2, 3), "b": (4,)}
    check_tensors(dict(reversed(expected.items())), expected, "where")
    with pytest.raises(CheckpointError) as error:
        check_tensors(shapes, expected, "where")
    assert str(error.value) == message


def test_defaults_of_a_model_are_resolved():
    model = ModelConfig(dim=32, num_layers=2, num_future_tokens=1, num_attention_heads=4, vocab_size=10)
    resolved = resolve_defaults(model)
    assert (resolved.num_key_value_heads, resolved.mlp_dim) == (4, model.hidden_dim)
    assert Contents(model, {}).model == resolved == resolve_defaults(resolved)
    assert resolved.chain_weights is None
    for form, weights in (("deepseek", "own"), ("eagle3", "shared")):
        chained = dataclasses.replace(model, head_kind="chained", chain_form=form)
        assert resolve_defaults(chained).chain_weights == weights
        assert resolve_defaults(dataclasses.replace(chained, chain_weights="shared")).chain_weights == "shared"


def test_has_optimizer_state():
    full = with_moments(SMALL)
    assert full.has_optimizer_state and full.kinds == ("weight", "exp_avg", "exp_avg_sq")
    for lacking in ({"step": None}, {"state": None}, {"sources": {"weight": full.weights, "exp_avg": full.weights}}):
        incomplete = dataclasses.replace(full, **lacking)
        assert not incomplete.has_optimizer_state and incomplete.kinds == ("weight",)


def test_has_end_of_text(tmp_path):
    empty = Contents(SMALL, {})
    assert not empty.has_end_of_text
    for known in (
        {"tokenizer": tmp_path / "tokenizer.model"},
        {"tokens_are_bytes": True},
        {"special_ids": {"eos_token_id": 0}},
    ):
        assert dataclasses.replace(empty, **known).has_end_of_text


@pytest.mark.parametrize("value", [None, 0, -1, 1.0, True, "3"])
def test_values_other_than_positive_integers_are_refused(value):
    assert positive_integer({"size": 3}, "size", Path("config.json")) == 3
    with pytest.raises(CheckpointError, match=r"config\.json: size is .*; expected a whole number of at least 1"):
        positive_integer({"size": value}, "size", Path("config.json"))


def test_model_with_missing_unknown_or_invalid_fields_is_refused():
    settings, where = dataclasses.asdict(SMALL), Path("canonical.json")
    assert model_from_fields(settings, where) == SMALL
    del settings["head_kind"]  # as megamtp 0.1 wrote it
    for added_later in ("first_head", "chain_form", "chain_weights", "unembedding", "match_parameters"):
        del settings[added_later]
    assert model_from_fields(settings, where) == SMALL
    eagle = {"head_kind": "chained", "chain_form": "eagle3", "chain_weights": "shared", "match_parameters": False}
    assert model_from_fields(settings | eagle, where) == dataclasses.replace(SMALL, **eagle)
    with pytest.raises(CheckpointError, match=r"canonical.json: model\.depth is missing or unknown"):
        model_from_fields(settings | {"depth": 3}, where)
    for field, value, expected in (
        ("dim", "32", "a number"),
        ("dim", True, "a number"),
        ("match_parameters", 1, "true or false"),
        ("head_kind", None, "text"),
        ("chain_weights", True, "text or null"),
    ):
        with pytest.raises(CheckpointError) as error:
            check_model(dataclasses.replace(SMALL, **{field: value}), where)
        assert str(error.value) == f"canonical.json: model.{field} is {value!r}; expected {expected}: correct it"
    with pytest.raises(CheckpointError, match=r"^canonical.json: model\.dim=30"):
        check_model(dataclasses.replace(SMALL, dim=30), where)


def test_formats_refuse_kinds_of_heads_that_they_cannot_hold():
    own, causal = (Contents(dataclasses.replace(SMALL, head_kind=kind), {}) for kind in ("own:Head", "causal"))
    require_head_kinds(Contents(SMALL, {}), "meta")
    require_head_kinds(causal, "hf", ("parallel", "causal"))
    for refused, kinds, message in (
        (causal, ("parallel",), "causal; expected model.head_kind=parallel"),
        (own, ("parallel", "causal"), "own:Head; expected model.head_kind=parallel or causal"),
    ):
        with pytest.raises(CheckpointError) as error:
            require_head_kinds(refused, "x", kinds)
        assert str(error.value) == f"x cannot hold heads of the kind {message}: use canonical"
    with pytest.raises(
        CheckpointError, match=r"^meta cannot hold .* expected model\.unembedding=shared: use canonical"
    ):
        require_head_kinds(Contents(dataclasses.replace(SMALL, unembedding="replicated"), {}), "meta")
