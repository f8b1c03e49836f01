"""Formats are recognised by the names of their files; another number of heads or another model is refused."""

import dataclasses
import re

import pytest

from megamtp.checkpoint import canonical, formats
from megamtp.checkpoint.formats import FORMATS, Options, detect, readable, writable
from megamtp.errors import CheckpointError
from tests.checkpoints import SMALL, with_moments

# Files, or folders with a "/" at the end.
MARKS = {
    "run": ["checkpoints/", "config.yaml"],
    "canonical": ["canonical.json"],
    "hf": ["config.json", "model.safetensors"],
    "hf-mtp": ["config.json", "modeling_megamtp.py"],
    "meta": ["params.json", "consolidated.pth"],
    "universal": ["latest_universal"],
    "megatron": ["latest_checkpointed_iteration.txt"],
}


@pytest.mark.parametrize("name", MARKS)
def test_a_format_is_recognised(name, tmp_path):
    for mark in MARKS[name]:
        (tmp_path / mark).mkdir() if mark.endswith("/") else (tmp_path / mark).touch()
    assert detect(tmp_path) == name


def test_all_formats_are_read_and_all_but_megatrons_written():
    assert readable() == list(MARKS) == list(FORMATS)
    assert writable() == [name for name in MARKS if name != "megatron"]


def test_one_checkpoint_of_a_run_is_of_its_format(tmp_path):
    (tmp_path / "checkpoints/step-0000003").mkdir(parents=True)
    (tmp_path / "elsewhere/step-0000003").mkdir(parents=True)
    assert detect(tmp_path / "checkpoints/step-0000003") == "run"
    with pytest.raises(CheckpointError, match="is no checkpoint of a known format"):
        detect(tmp_path / "elsewhere/step-0000003")


def test_what_is_no_checkpoint_is_one_line_with_all_formats(tmp_path):
    (tmp_path / "empty").mkdir()
    formats_of_message = "expected .*one of these: " + ", ".join(readable())
    for place, words in (
        (tmp_path / "empty", "is no checkpoint of a known format"),
        (tmp_path / "missing", "does not exist"),
        (tmp_path / ("x" * 300), "cannot be read: File name too long"),
    ):
        with pytest.raises(CheckpointError, match=f"^{re.escape(str(place))} {words}; {formats_of_message}$"):
            detect(place)


def test_another_number_of_heads_or_another_model_is_refused(tmp_path):
    canonical.write(with_moments(SMALL), tmp_path / "canonical")
    assert formats.read(tmp_path / "canonical", Options(num_future_tokens=3, model=SMALL)).model.num_future_tokens == 3
    with pytest.raises(CheckpointError, match="has 3 heads, --num-future-tokens says 4; leave it out"):
        formats.read(tmp_path / "canonical", Options(num_future_tokens=4))
    with pytest.raises(CheckpointError, match=r"model\.mlp_dim"):
        formats.read(tmp_path / "canonical", Options(model=dataclasses.replace(SMALL, mlp_dim=64)))
