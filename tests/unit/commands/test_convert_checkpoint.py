"""Tests the output of convert_checkpoint. tests/end_to_end/test_convert.py converts every format to every other."""

import dataclasses
import sys
from pathlib import Path

from megamtp.checkpoint import hf, meta
from megamtp.commands import convert_checkpoint
from tests.checkpoints import SMALL, contents, random_model


def test_notes_that_the_source_has_no_end_token(tmp_path, monkeypatch, capsys):
    def convert(source: Path, target: str) -> str:
        monkeypatch.setattr(sys, "argv", ["convert", str(source), str(tmp_path / f"to-{target}"), "--to", target])
        convert_checkpoint.main()
        return capsys.readouterr().out

    unknown = contents(SMALL, random_model(SMALL).state_dict())
    meta.write(unknown, tmp_path / "meta")
    hf.export(dataclasses.replace(unknown, special_ids={"eos_token_id": 8}), tmp_path / "llama")
    words = "does not say which token ends a text"
    assert words in convert(tmp_path / "meta", "hf") and words in convert(tmp_path / "meta", "hf-mtp")
    assert words not in convert(tmp_path / "meta", "canonical")
    assert words not in convert(tmp_path / "llama", "hf")
