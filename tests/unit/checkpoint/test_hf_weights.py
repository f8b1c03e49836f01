"""Weights in transformers' folders: in one file or several, pickled or not, and refusal of damaged folders."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from megamtp.checkpoint import canonical, hf, safetensors_file
from megamtp.checkpoint.tensors import read_tensor
from megamtp.errors import CheckpointError
from megamtp.model.mtp import MTPModel
from tests.checkpoints import SMALL, contents, random_model
from tests.llama import save_llama


@pytest.mark.parametrize("num_files", [1, 2])
def test_pickled_weights_are_read(tmp_path, num_files):
    theirs = save_llama(tmp_path / "llama")
    opened = hf.read(tmp_path / "llama").weights
    expected = {name: read_tensor(opened, name) for name in opened.shapes}
    for file in (tmp_path / "llama").glob("model*"):
        file.unlink()
    files = (
        {f"pytorch_model-{number}.bin": {} for number in range(num_files)}
        if num_files > 1
        else {"pytorch_model.bin": {}}
    )
    weight_map = {name: list(files)[index % num_files] for index, name in enumerate(theirs.state_dict())}
    for name, tensor in theirs.state_dict().items():
        files[weight_map[name]][name] = tensor
    for file, tensors in files.items():
        torch.save(tensors, tmp_path / "llama" / file)
    if num_files > 1:
        (tmp_path / "llama/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    pickled = hf.read(tmp_path / "llama").weights
    assert pickled.shapes.keys() == expected.keys()
    assert all(torch.equal(read_tensor(pickled, name), tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("zipped", [True, False])
def test_transposed_weights_are_read_in_both_formats_of_torch(tmp_path, zipped):
    save_llama(tmp_path / "llama")
    opened = hf.read(tmp_path / "llama").weights
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "llama").state_dict()
    for file in (tmp_path / "llama").glob("model*"):
        file.unlink()
    tensors = {name: torch.nn.Parameter(tensor.t().contiguous().t()) for name, tensor in theirs.items()}
    assert not tensors["lm_head.weight"].is_contiguous()
    torch.save(tensors, tmp_path / "llama/pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    canonical.write(hf.read(tmp_path / "llama"), tmp_path / "canonical")
    weights = canonical.read(tmp_path / "canonical").weights
    for ours, name in hf.names_of(hf.read(tmp_path / "llama").model).items():
        assert torch.equal(read_tensor(weights, ours), theirs[name])
    assert weights.shapes == opened.shapes


def test_folder_without_weights_and_damaged_index_are_refused(tmp_path):
    save_llama(tmp_path / "llama")
    index = tmp_path / "llama/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": None}}))
    with pytest.raises(CheckpointError, match=r"index.json cannot be read \(weight_map has values that are not"):
        hf.read(tmp_path / "llama")
    index.unlink()
    with pytest.raises(
        CheckpointError, match=r"has no model.safetensors; expected it, its index, or pytorch_model.bin"
    ):
        hf.read(tmp_path / "llama")


def test_rotary_frequencies_in_older_files_are_ignored(tmp_path):
    save_llama(tmp_path / "llama")
    index = tmp_path / "llama/model.safetensors.index.json"
    content = json.loads(index.read_text())
    save_file({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, tmp_path / "llama/old.safetensors")
    content["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = "old.safetensors"
    index.write_text(json.dumps(content))
    assert (
        hf.read(tmp_path / "llama").weights.shapes.keys()
        == MTPModel(hf.read(tmp_path / "llama").model).state_dict().keys()
    )


def test_large_model_is_split_into_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "LARGEST_FILE_BYTES", 40_000)
    model = random_model(SMALL)
    hf.export(contents(SMALL, model.state_dict()), tmp_path / "exported")
    assert len(list((tmp_path / "exported").glob("*.safetensors"))) > 1
    weights = hf.read(tmp_path / "exported").weights
    assert all(torch.equal(read_tensor(weights, name), model.state_dict()[name]) for name in weights.shapes)
    AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
