"""The hf-mtp format: round trips are bit-exact, also through transformers, and bad folders are refused."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megamtp.checkpoint import hf_mtp
from megamtp.checkpoint.contents import resolve_defaults
from megamtp.checkpoint.tensors import read_tensor
from megamtp.config import ModelConfig
from megamtp.errors import CheckpointError
from tests.checkpoints import HEADS, SMALL, contents, random_model


@pytest.fixture
def folder(tmp_path) -> Path:
    hf_mtp.write(contents(SMALL, random_model(SMALL).state_dict()), tmp_path / "exported")
    return tmp_path / "exported"


def check_equal(read, config: ModelConfig) -> None:
    """Checks that the contents that were read are those of random_model(config), bit for bit."""
    expected = random_model(config).state_dict()
    assert read.model == resolve_defaults(config)
    assert read.weights.shapes.keys() == expected.keys()
    assert all(torch.equal(read_tensor(read.weights, name), weight) for name, weight in expected.items())


@pytest.mark.parametrize("heads", HEADS)
def test_round_trip_is_bit_exact_also_through_transformers(tmp_path, heads):
    config = dataclasses.replace(SMALL, **HEADS[heads])
    hf_mtp.write(contents(config, random_model(config).state_dict()), tmp_path / "exported")
    check_equal(hf_mtp.read(tmp_path / "exported"), config)
    AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True).save_pretrained(
        tmp_path / "saved"
    )
    check_equal(hf_mtp.read(tmp_path / "saved"), config)


@pytest.mark.parametrize("heads", HEADS)
def test_one_head_is_read_back(tmp_path, heads):
    config = dataclasses.replace(SMALL, num_future_tokens=1, **HEADS[heads])
    hf_mtp.write(contents(config, random_model(config).state_dict()), tmp_path / "exported")
    check_equal(hf_mtp.read(tmp_path / "exported"), config)


def edit(folder: Path, settings: dict, without: tuple[str, ...] = ()) -> None:
    """Changes config.json."""
    path = folder / "config.json"
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in without}
    path.write_text(json.dumps(kept | settings))


def test_exports_of_older_versions_are_read(folder):
    """Their config.json has the number of heads, but no kind."""
    edit(folder, {}, ("head_kind", "first_head", "chain_form", "chain_weights", "match_parameters", "num_layers"))
    check_equal(hf_mtp.read(folder), SMALL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"head_kind": "os:Head"},
            "head_kind is 'os:Head'; expected parallel or linear or causal or anticausal or chained: correct it",
        ),
        ({"first_head": 3}, "model.first_head=3; expected str"),
        ({"head_kind": "chained", "chain_form": "deep"}, "model.chain_form=deep; expected deepseek or eagle3"),
        ({"match_parameters": None}, "model.match_parameters is None; expected true or false: correct it"),
        ({"num_layers": 6}, "num_hidden_layers is 3, expected 4: unsupported architecture"),
        ({"num_layers": "6"}, "model.num_layers is '6'; expected a number: correct it"),
    ],
)
def test_invalid_heads_are_refused(folder, settings, message):
    edit(folder, settings)
    with pytest.raises(CheckpointError) as error:
        hf_mtp.read(folder)
    assert str(error.value) == f"{folder / 'config.json'}: {message}"


def test_heads_of_the_users_own_are_refused(tmp_path):
    with pytest.raises(CheckpointError) as error:
        hf_mtp.write(contents(dataclasses.replace(SMALL, head_kind="own:Head"), {}), tmp_path / "exported")
    assert str(error.value) == (
        "hf-mtp cannot hold heads of the kind own:Head; expected model.head_kind=parallel or linear or causal or "
        "anticausal or chained: use canonical"
    )


def test_config_without_number_of_heads_is_refused(folder):
    edit(folder, {}, ("num_future_tokens",))
    with pytest.raises(CheckpointError, match="no num_future_tokens"):
        hf_mtp.read(folder)
