"""The hf-mtp format: round trips are bit-exact, also through transformers, and bad folders are refused."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megamtp.checkpoint import hf_mtp
from megamtp.checkpoint.contents import resolve_defaults
from megamtp.checkpoint.tensors import read_tensor
from megamtp.errors import CheckpointError
from tests.checkpoints import SMALL, contents, random_model


@pytest.fixture
def folder(tmp_path) -> Path:
    hf_mtp.write(contents(SMALL, random_model(SMALL).state_dict()), tmp_path / "exported")
    return tmp_path / "exported"


def test_round_trip_is_bit_exact_also_through_transformers(folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path / "saved")
    expected = random_model(SMALL).state_dict()
    for source in (folder, tmp_path / "saved"):
        read = hf_mtp.read(source)
        assert read.model == resolve_defaults(SMALL)
        assert read.weights.shapes.keys() == expected.keys()
        assert all(torch.equal(read_tensor(read.weights, name), weight) for name, weight in expected.items())


def test_config_without_number_of_heads_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text().replace("num_future_tokens", "other"))
    with pytest.raises(CheckpointError, match="no num_future_tokens"):
        hf_mtp.read(tmp_path)
