"""Special ids survive conversions even if the tokenizer does not, and a note tells if they are unknown."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from megamtp.checkpoint import formats, hf
from megamtp.checkpoint.special_ids import read_special_ids
from megamtp.errors import CheckpointError
from tests.checkpoints import SMALL, contents, random_model, with_moments

IDS = {"bos_token_id": 7, "eos_token_id": [8, 9], "pad_token_id": 10}


@pytest.fixture
def llama(tmp_path) -> Path:
    """Writes a Llama whose tokenizer is not a SentencePiece model.

    config.json and generation_config.json have different eos_token_id, as in Llama 3.
    """
    folder = tmp_path / "llama"
    hf.export(contents(SMALL, random_model(SMALL).state_dict()), folder)
    (folder / "tokenizer.json").write_text(json.dumps({"long": "x" * 200_000}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": 7, "eos_token_id": 8, "pad_token_id": 10}))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 7, "eos_token_id": [8, 9], "temperature": 0.6})
    )
    return folder


def exported_ids(folder: Path) -> list[dict]:
    settings = [json.loads((folder / name).read_text()) for name in ("config.json", "generation_config.json")]
    return [{key: value for key, value in each.items() if key.endswith("_token_id")} for each in settings]


@pytest.mark.parametrize("targets", [["hf"], ["hf-mtp"], ["canonical", "hf"], ["meta", "canonical", "hf-mtp", "hf"]])
def test_conversions_of_weights_keep_special_ids(tmp_path, llama, targets):
    read = formats.read(llama)
    assert read.special_ids == IDS
    assert "bos_token_id 7, eos_token_id [8, 9], pad_token_id 10 are kept" in read.notes[0]
    for number, target in enumerate(targets):
        formats.FORMATS[target].write(read, tmp_path / f"{number}", torch.float32)
        read = formats.read(tmp_path / f"{number}")
    assert exported_ids(tmp_path / f"{number}") == [IDS, IDS]


def test_conversions_of_training_states_keep_special_ids(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    state = dataclasses.replace(with_moments(SMALL), special_ids=IDS)
    for target in ("run", "universal", "canonical", "hf"):
        formats.FORMATS[target].write(state, tmp_path / target, torch.float32)
        state = formats.read(tmp_path / target)
        assert state.special_ids == IDS
    assert exported_ids(tmp_path / "hf") == [IDS, IDS]


def test_values_outside_the_vocabulary_are_ignored_and_damaged_file_is_refused(tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"bos_token_id": -1, "eos_token_id": [2, 300], "pad_token_id": "2"}))
    assert read_special_ids(tmp_path, 300) == {}
    assert read_special_ids(tmp_path, 301) == {"eos_token_id": [2, 300]}
    for content in ("[3]", "{", "[" * 100_000):
        path.write_text(content)
        with pytest.raises(CheckpointError, match=r"^[^\n]*generation_config.json cannot be read"):
            read_special_ids(tmp_path, 300)
