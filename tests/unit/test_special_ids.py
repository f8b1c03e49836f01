"""Special ids survive conversions even if the tokenizer does not, and a note tells if they are unknown."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from megamtp.checkpoint import formats, hf, meta
from megamtp.checkpoint.special_ids import read_special_ids
from megamtp.commands import convert_checkpoint
from megamtp.data.tokenizer import train_sentencepiece
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


def test_note_about_an_unknown_end_of_text(tmp_path, llama, monkeypatch, capsys):
    def convert(source: Path, target: str) -> str:
        monkeypatch.setattr(sys, "argv", ["convert", str(source), str(tmp_path / f"to-{target}"), "--to", target])
        convert_checkpoint.main()
        return capsys.readouterr().out

    meta.write(contents(SMALL, random_model(SMALL).state_dict()), tmp_path / "meta")
    words = "does not say which token ends a text"
    assert words in convert(tmp_path / "meta", "hf") and words in convert(tmp_path / "meta", "hf-mtp")
    assert words not in convert(tmp_path / "meta", "canonical")
    assert words not in convert(llama, "hf")


@pytest.mark.parametrize("parent", ["meta", "."])
def test_tokenizer_of_metas_releases_is_found_in_the_folder_or_its_parent(tmp_path, monkeypatch, parent):
    texts = [Path(module.__file__).read_text() for module in (dataclasses, json, formats)]
    train_sentencepiece(texts, tmp_path / "made.model", vocab_size=500, seed=0)
    config = dataclasses.replace(SMALL, vocab_size=500)
    meta.write(contents(config, random_model(config).state_dict()), tmp_path / "meta")
    path = (tmp_path / "made.model").rename(tmp_path / parent / "tokenizer.model")
    monkeypatch.chdir(tmp_path / "meta")
    for folder in (tmp_path / "meta", Path(".")):
        read = meta.read(folder)
        assert read.tokenizer.samefile(path) and read.notes == ()
    hf.export(read, tmp_path / "hf")
    assert exported_ids(tmp_path / "hf")[0]["eos_token_id"] is not None
    path.write_text("tiktoken")
    read = meta.read(Path("."))
    assert read.tokenizer is None and [note.split(" is not ")[0] for note in read.notes] == [str(path)]
