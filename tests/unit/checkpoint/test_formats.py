"""Formats are detected by the names of their files, and other numbers of heads or models are refused."""

import dataclasses
import re

import pytest

from megamtp.checkpoint import canonical, formats
from megamtp.checkpoint.formats import FORMATS, Options, detect, readable_formats, writable_formats
from megamtp.errors import CheckpointError
from tests.checkpoints import SMALL, with_moments

# Files of each format; folders end in "/".
FILES = {
    "run": ["checkpoints/", "config.yaml"],
    "canonical": ["canonical.json"],
    "hf": ["config.json", "model.safetensors"],
    "hf-mtp": ["config.json", "modeling_megamtp.py"],
    "meta": ["params.json", "consolidated.pth"],
    "universal": ["latest_universal"],
    "megatron": ["latest_checkpointed_iteration.txt"],
}


@pytest.mark.parametrize("name", FILES)
def test_format_is_detected(name, tmp_path):
    for file in FILES[name]:
        (tmp_path / file).mkdir() if file.endswith("/") else (tmp_path / file).touch()
    assert detect(tmp_path) == name


def test_all_formats_except_megatron_can_be_written():
    assert readable_formats() == list(FILES) == list(FORMATS)
    assert writable_formats() == [name for name in FILES if name != "megatron"]


def test_single_checkpoint_of_a_run_is_detected(tmp_path):
    (tmp_path / "checkpoints/step-0000003").mkdir(parents=True)
    (tmp_path / "elsewhere/step-0000003").mkdir(parents=True)
    assert detect(tmp_path / "checkpoints/step-0000003") == "run"
    with pytest.raises(CheckpointError, match="is not a checkpoint of a known format"):
        detect(tmp_path / "elsewhere/step-0000003")


def test_message_for_other_folders_lists_all_formats(tmp_path):
    (tmp_path / "empty").mkdir()
    formats_in_message = "expected .*one of these.*: " + ", ".join(readable_formats())
    for source, problem in (
        (tmp_path / "empty", "is not a checkpoint of a known format"),
        (tmp_path / "missing", "does not exist"),
        (tmp_path / ("x" * 300), "cannot be read: File name too long"),
    ):
        with pytest.raises(CheckpointError, match=f"^{re.escape(str(source))} {problem}; {formats_in_message}$"):
            detect(source)


def test_another_number_of_heads_or_another_model_is_refused(tmp_path):
    canonical.write(with_moments(SMALL), tmp_path / "canonical")
    assert formats.read(tmp_path / "canonical", Options(num_future_tokens=3, model=SMALL)).model.num_future_tokens == 3
    with pytest.raises(CheckpointError, match="has 3 heads, expected --num-future-tokens=4; leave"):
        formats.read(tmp_path / "canonical", Options(num_future_tokens=4))
    with pytest.raises(CheckpointError, match=r"model\.mlp_dim"):
        formats.read(tmp_path / "canonical", Options(model=dataclasses.replace(SMALL, mlp_dim=64)))
