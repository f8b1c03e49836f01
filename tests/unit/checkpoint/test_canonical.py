"""The canonical format: bit-exact round trips, and refusal of bad checkpoints."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from megamtp.checkpoint import canonical, folder, safetensors_file
from megamtp.checkpoint.contents import resolve_defaults
from megamtp.checkpoint.tensors import read_tensor
from megamtp.errors import CheckpointError
from tests.checkpoints import SMALL, STATE, with_moments


@pytest.fixture
def written(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(safetensors_file, "LARGEST_FILE_BYTES", 50_000)
    canonical.write(with_moments(SMALL), tmp_path / "canonical")
    return tmp_path / "canonical"


def edit(written: Path, **settings) -> None:
    path = written / "canonical.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_round_trip_through_several_files_is_bit_exact(written):
    contents, expected = canonical.read(written), with_moments(SMALL)
    assert len(list(written.glob("exp_avg_sq-*"))) > 1
    assert (contents.model, contents.step, contents.state) == (resolve_defaults(SMALL), 9, STATE)
    assert contents.sequence_length == 64
    assert contents.sources.keys() == expected.sources.keys()
    for kind, source in expected.sources.items():
        assert list(contents.sources[kind].shapes) == list(source.shapes)
        for name in source.shapes:
            assert torch.equal(read_tensor(contents.sources[kind], name), read_tensor(source, name))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"version": 2}, "version 2, written by megamtp .*; expected at most 1"),
        ({"format": "other"}, "format other 1, expected megamtp-canonical 1"),
        ({"model": None}, "model is None; expected a mapping"),
        ({"file_bytes": {"x" * 300: 1}}, "canonical cannot be read: File name too long; copy it again"),
        ({"model": {"dim": 3}}, "model.mlp_dim is missing or unknown"),
        ({"model": dataclasses.asdict(SMALL) | {"dim": "32"}}, "canonical.json: model.dim is '32'; expected a number"),
        (
            {"model": dataclasses.asdict(SMALL) | {"num_attention_heads": 5}},
            "model.dim=32 with model.num_attention_heads=5",
        ),
        (
            {"model": dataclasses.asdict(SMALL) | {"num_layers": 10**6}},
            "model.num_layers=1000000; expected at most 1000",
        ),
        (
            {"model": dataclasses.asdict(SMALL) | {"mlp_dim": 64}},
            r"tensor trunk.0.mlp.gate.weight has shape \[48, 32\], expected",
        ),
        ({"model": dataclasses.asdict(SMALL) | {"num_layers": 6}}, r"no tensor trunk.2.attention_norm.weight"),
        ({"model": dataclasses.asdict(SMALL) | {"num_layers": 4}}, r"unknown tensor trunk.1"),
    ],
)
def test_wrong_versions_and_models_are_refused(written, settings, message):
    edit(written, **settings)
    with pytest.raises(CheckpointError, match=message) as caught:
        canonical.read(written)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_missing_or_truncated_file_is_refused(written, damage):
    file = sorted(written.glob("exp_avg-*"))[1]
    damage(file)
    with pytest.raises(CheckpointError, match=f"{file.name} .*expected [0-9]+ bytes"):
        canonical.read(written)


def test_existing_destination_and_full_disk_are_refused_before_writing(written, monkeypatch):
    before = {path.name: path.read_bytes() for path in written.iterdir()}
    with pytest.raises(CheckpointError, match="holds other files"):
        canonical.write(with_moments(SMALL), written)
    assert before == {path.name: path.read_bytes() for path in written.iterdir()}
    usage = folder.shutil.disk_usage(written)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"needs [0-9,]+ bytes, but only 1,000 are free there"):
        canonical.write(with_moments(SMALL), written.parent / "deep" / "down")
    assert [path.name for path in written.parent.iterdir()] == ["canonical"]


def test_missing_tokenizer_is_named(tmp_path):
    source = dataclasses.replace(with_moments(SMALL), tokenizer=tmp_path / "tokenizer.model")
    with pytest.raises(
        CheckpointError, match=r"tokenizer.model cannot be read \(No such file or directory\); correct data.tokenizer"
    ):
        canonical.write(source, tmp_path / "canonical")
    assert not list(tmp_path.iterdir())
