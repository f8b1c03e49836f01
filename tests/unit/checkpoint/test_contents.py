"""What a checkpoint holds: what is missing or wrong is named, and rows of other tensors are read."""

import dataclasses
from pathlib import Path

import pytest
import torch

from megamtp.checkpoint.contents import (
    Contents,
    Rearranged,
    Rows,
    check_tensors,
    checked_model,
    described_model,
    parameter_shapes,
    renamed,
    require_parallel_heads,
    whole_number,
    written_out,
)
from megamtp.checkpoint.tensors import InMemory
from megamtp.config import ModelConfig
from megamtp.errors import CheckpointError
from tests.checkpoints import SMALL, random_model, with_moments


def test_rows_of_a_tensor_are_read_by_slice():
    source = InMemory({"a": torch.arange(24.0).view(6, 2, 2), "b": torch.arange(5.0)})
    rows = torch.tensor([4, 5, 0, 1, 3])
    found = Rearranged(source, {"x": Rows("a", rows), "y": Rows("b")})
    assert found.shapes == {"x": (5, 2, 2), "y": (5,)}
    expected = source.weights["a"][rows].flatten()
    for start in range(len(expected) + 1):
        for end in (*range(start, len(expected) + 1), None):
            assert torch.equal(found.read("x", start, end), expected[start:end])
    assert torch.equal(found.read("y", 1, 3), torch.tensor([1.0, 2.0]))


def test_a_tensor_under_another_name():
    found = renamed(InMemory({"theirs": torch.arange(6.0).view(2, 3)}), {"ours": "theirs"})
    assert found.shapes == {"ours": (2, 3)} and found.read("ours", 2, 4).tolist() == [2.0, 3.0]


def test_shapes_are_those_of_the_model():
    model = random_model(SMALL)
    assert parameter_shapes(SMALL) == {name: tuple(each.shape) for name, each in model.named_parameters()}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"a": (2, 3)}, "where has no tensor b; expected one of shape [4]"),
        ({"a": (3, 2), "b": (4,)}, "where: tensor a has shape [3, 2], expected [2, 3]"),
        ({"a": (2, 3), "b": (4,), "c": (1,)}, "where has an unknown tensor c; expected only its configuration's 2"),
    ],
)
def test_missing_misshaped_and_unknown_tensors_are_named(found, words):
    expected = {"a": (2, 3), "b": (4,)}
    check_tensors(dict(reversed(expected.items())), expected, "where")
    with pytest.raises(CheckpointError) as error:
        check_tensors(found, expected, "where")
    assert str(error.value) == words


def test_numbers_that_a_model_leaves_to_its_defaults_are_written_out():
    model = ModelConfig(dim=32, num_layers=2, num_future_tokens=1, num_attention_heads=4, vocab_size=10)
    found = written_out(model)
    assert (found.num_key_value_heads, found.mlp_dim) == (4, model.hidden_dim)
    assert Contents(model, {}).model == found == written_out(found)


def test_which_state_a_run_can_go_on_with():
    full = with_moments(SMALL)
    assert full.has_optimizer_state and full.kinds == ("weight", "exp_avg", "exp_avg_sq")
    for lacking in ({"step": None}, {"state": None}, {"sources": {"weight": full.weights, "exp_avg": full.weights}}):
        found = dataclasses.replace(full, **lacking)
        assert not found.has_optimizer_state and found.kinds == ("weight",)


def test_when_it_is_known_which_token_ends_a_text(tmp_path):
    empty = Contents(SMALL, {})
    assert not empty.ends_texts
    for known in (
        {"tokenizer": tmp_path / "tokenizer.model"},
        {"tokens_are_bytes": True},
        {"special_ids": {"eos_token_id": 0}},
    ):
        assert dataclasses.replace(empty, **known).ends_texts


@pytest.mark.parametrize("value", [None, 0, -1, 1.0, True, "3"])
def test_what_is_no_whole_number_is_named(value):
    assert whole_number({"size": 3}, "size", Path("config.json")) == 3
    with pytest.raises(CheckpointError, match=r"config\.json: size is .*; expected a whole number, at least 1"):
        whole_number({"size": value}, "size", Path("config.json"))


def test_a_described_model_has_every_field_and_possible_numbers():
    settings, where = dataclasses.asdict(SMALL), Path("canonical.json")
    assert described_model(settings, where) == SMALL
    del settings["head_kind"]  # as megamtp 0.1 wrote it
    assert described_model(settings, where) == SMALL
    with pytest.raises(CheckpointError, match=r"canonical.json: model\.depth is missing or unknown"):
        described_model(settings | {"depth": 3}, where)
    with pytest.raises(CheckpointError, match=r"canonical.json: model\.dim is '32'; expected a number: mend it"):
        checked_model(dataclasses.replace(SMALL, dim="32"), where)
    with pytest.raises(CheckpointError, match=r"^canonical.json: model\.dim=30"):
        checked_model(dataclasses.replace(SMALL, dim=30), where)


def test_a_form_for_layers_holds_no_other_heads():
    require_parallel_heads(Contents(SMALL, {}), "hf-mtp")
    with pytest.raises(CheckpointError, match=r"^hf-mtp cannot hold heads of the kind own:Head; expected"):
        require_parallel_heads(Contents(dataclasses.replace(SMALL, head_kind="own:Head"), {}), "hf-mtp")
