"""The export of all heads: back bit for bit, also through transformers, and what is refused."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megamtp.checkpoint import hf_mtp
from megamtp.checkpoint.contents import written_out
from megamtp.checkpoint.tensors import whole
from megamtp.errors import CheckpointError
from tests.checkpoints import SMALL, contents, random_model


@pytest.fixture
def folder(tmp_path) -> Path:
    hf_mtp.write(contents(SMALL, random_model(SMALL).state_dict()), tmp_path / "exported")
    return tmp_path / "exported"


def test_back_bit_for_bit_and_through_transformers(folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path / "saved")
    expected = random_model(SMALL).state_dict()
    for source in (folder, tmp_path / "saved"):
        found = hf_mtp.read(source)
        assert found.model == written_out(SMALL)
        assert found.weights.shapes.keys() == expected.keys()
        assert all(torch.equal(whole(found.weights, name), weight) for name, weight in expected.items())


def test_a_configuration_without_heads_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text().replace("num_future_tokens", "other"))
    with pytest.raises(CheckpointError, match="no num_future_tokens"):
        hf_mtp.read(tmp_path)
