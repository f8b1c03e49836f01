"""The hf format: transformers computes the same logits, round trips are bit-exact, and bad input is refused."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from megamtp.checkpoint import canonical, hf, safetensors_file
from megamtp.checkpoint.tensors import read_tensor
from megamtp.config import ModelConfig
from megamtp.errors import CheckpointError
from megamtp.model.mtp import MTPModel
from tests.checkpoints import HEADS, SMALL, VOCABULARY, contents, random_model
from tests.llama import save_llama


def read_back(folder: Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    contents = hf.read(folder)
    return contents.model, {name: read_tensor(contents.weights, name) for name in contents.weights.shapes}


@pytest.fixture
def exported(tmp_path) -> Path:
    hf.export(contents(SMALL, random_model(SMALL).state_dict()), tmp_path / "exported")
    return tmp_path / "exported"


@pytest.mark.parametrize("key_value_heads", [None, 2, 1])
@pytest.mark.parametrize("num_future_tokens", [1, 3])
def test_transformers_computes_the_same_logits(tmp_path, key_value_heads, num_future_tokens):
    config = dataclasses.replace(SMALL, num_key_value_heads=key_value_heads, num_future_tokens=num_future_tokens)
    model = random_model(config)
    hf.export(contents(config, model.state_dict()), tmp_path / "exported")
    llama, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(loading.values()), loading
    assert llama.config.num_hidden_layers == 5 - num_future_tokens + 1
    assert llama.dtype == torch.float32
    tokens = torch.randint(VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, logits = model.logits(tokens)[0], llama(tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("heads", [heads for heads in HEADS if heads != "linear"])
def test_trunk_and_head_1_of_every_kind_are_a_llama(tmp_path, heads):
    config = dataclasses.replace(SMALL, **HEADS[heads])
    model = random_model(config)
    hf.export(contents(config, model.state_dict()), tmp_path / "exported")
    llama, loading = LlamaForCausalLM.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(loading.values()), loading
    num_heads = 3 if heads == "anticausal" else 1
    assert llama.config.num_hidden_layers == len(model.trunk) + num_heads
    tokens = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, logits = model.logits(tokens, tokens[:, :2])[0], llama(tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    read, weights = read_back(tmp_path / "exported")
    assert (read.head_kind, read.num_future_tokens) == ("parallel", 1)
    ours = [*model.trunk, *(model.heads[index] for index in range(num_heads)[::-1])]
    theirs = [f"trunk.{index}" for index in range(read.num_trunk_layers)] + ["heads.0"]
    for layer, their_name in zip(ours, theirs, strict=True):
        for name, weight in layer.state_dict().items():
            assert torch.equal(weights[f"{their_name}.{name}"], weight)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (
            {"head_kind": "linear"},
            "hf cannot hold heads of the kind linear with model.first_head=same; expected model.first_head=layer, "
            "because each layer of a Llama is a transformer layer: use hf-mtp",
        ),
        (
            {"head_kind": "own:Head"},
            "hf cannot hold heads of the kind own:Head; expected model.head_kind=parallel or linear or causal or "
            "anticausal or chained: use canonical",
        ),
    ],
)
def test_heads_that_are_no_layers_are_refused(tmp_path, heads, message):
    with pytest.raises(CheckpointError) as error:
        hf.export(contents(dataclasses.replace(SMALL, **heads), {}), tmp_path / "exported")
    assert str(error.value) == message
    assert not list(tmp_path.iterdir())


def test_round_trip_is_bit_exact(exported):
    config, weights = read_back(exported)
    assert config == dataclasses.replace(SMALL, num_layers=3, num_future_tokens=1)
    expected = random_model(SMALL).state_dict()
    assert weights.keys() == {name for name in expected if not name.startswith(("heads.1.", "heads.2."))}
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    MTPModel(config).load_state_dict(weights, strict=True)


def test_model_that_transformers_has_saved_is_read(exported, tmp_path):
    AutoModelForCausalLM.from_pretrained(exported).save_pretrained(tmp_path / "saved")
    config, weights = read_back(tmp_path / "saved")
    expected_config, expected = read_back(exported)
    assert config == expected_config
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def drop(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def add(tensors):
    tensors["model.layers.1.mlp.up_proj.bias"] = torch.zeros(3)


def reshape(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(47, 32)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"),
        (add, r"unknown tensor model\.layers\.1\.mlp\.up_proj\.bias"),
        (reshape, r"tensor model\.layers\.1\.mlp\.up_proj\.weight has shape \[47, 32\], expected \[48, 32\]"),
    ],
)
def test_wrong_tensor_is_refused_when_reading(exported, damage, message):
    tensors = load_file(exported / "model.safetensors")
    damage(tensors)
    save_file(tensors, exported / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        hf.read(exported)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("heads.2.mlp.up.weight", None, r"no tensor heads\.2\.mlp\.up\.weight"),
        ("heads.3.mlp.up.weight", torch.zeros(48, 32), r"unknown tensor heads\.3\.mlp\.up\.weight"),
        (
            "trunk.0.attention.key.weight",
            torch.zeros(32, 32),
            r"trunk\.0\.attention\.key\.weight has shape \[32, 32\], expected \[16, 32\]",
        ),
    ],
)
def test_wrong_tensor_is_refused_when_exporting(tmp_path, name, value, message):
    weights = random_model(SMALL).state_dict() | {name: value}
    if value is None:
        del weights[name]
    with pytest.raises(CheckpointError, match=message):
        hf.export(contents(SMALL, weights), tmp_path / "exported")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:100])])
def test_missing_or_truncated_file_is_refused_in_one_line(exported, file, damage):
    damage(exported / file)
    with pytest.raises(CheckpointError) as caught:
        hf.read(exported)
    assert "\n" not in str(caught.value)


def test_earlier_export_is_replaced(exported):
    larger = dataclasses.replace(SMALL, mlp_dim=64)
    hf.export(contents(larger, random_model(larger).state_dict()), exported)
    assert hf.read(exported).model.mlp_dim == 64
    assert [path.name for path in exported.parent.iterdir()] == ["exported"]


def test_folder_with_other_files_is_refused_and_not_touched(exported):
    (exported / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    with pytest.raises(CheckpointError, match="holds other files"):
        hf.export(contents(SMALL, random_model(SMALL).state_dict()), exported)
    assert before == {path.name: path.read_bytes() for path in exported.iterdir()}


def test_all_files_have_the_same_permissions(exported):
    assert {path.stat().st_mode for path in exported.iterdir()} == {(exported / "config.json").stat().st_mode}


def test_empty_folder_is_accepted_and_file_is_refused(tmp_path):
    weights = random_model(SMALL).state_dict()
    (tmp_path / "empty").mkdir()
    hf.export(contents(SMALL, weights), tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        hf.export(contents(SMALL, weights), tmp_path / "file")


def test_failed_export_leaves_the_earlier_export_unchanged(exported, monkeypatch):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    monkeypatch.setattr(safetensors_file, "write", full_disk)
    with pytest.raises(CheckpointError, match="No space left on device"):
        hf.export(contents(SMALL, random_model(SMALL).state_dict()), exported)
    assert [path.name for path in exported.parent.iterdir()] == ["exported"]
    assert before == {path.name: path.read_bytes() for path in exported.iterdir()}


def test_unwritable_parent_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        hf.export(contents(SMALL, random_model(SMALL).state_dict()), tmp_path / "file" / "exported")


@pytest.mark.parametrize("tied", [False, True])
def test_head_1_of_a_converted_llama_computes_the_same_logits(tmp_path, tied):
    theirs = save_llama(tmp_path / "llama", tied)
    opened = hf.read(tmp_path / "llama", num_future_tokens=3)
    assert [("ties its unembedding" in note) for note in opened.notes] == [True] * tied
    canonical.write(opened, tmp_path / "canonical")
    converted = canonical.read(tmp_path / "canonical")
    model = converted.model
    assert (model.num_layers, model.num_trunk_layers, model.num_future_tokens) == (6, 3, 3)
    ours = MTPModel(model)
    weights = {name: read_tensor(converted.weights, name) for name in converted.weights.shapes}
    ours.load_state_dict(weights, strict=True)
    tokens = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, expected = ours.logits(tokens), theirs(tokens).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-5)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])  # heads 2 and 3 are copies


def test_16_bit_weights_survive_the_conversion_to_fp32(tmp_path):
    save_llama(tmp_path / "llama").bfloat16().save_pretrained(tmp_path / "half")
    canonical.write(hf.read(tmp_path / "half", 2), tmp_path / "canonical")
    assert read_tensor(canonical.read(tmp_path / "canonical").weights, "heads.1.mlp.up.weight").dtype == torch.float32
    hf.export(canonical.read(tmp_path / "canonical"), tmp_path / "back", torch.bfloat16)
    expected, exported = (LlamaForCausalLM.from_pretrained(tmp_path / name) for name in ("half", "back"))
    assert exported.dtype == torch.bfloat16
    assert all(torch.equal(tensor, exported.state_dict()[name]) for name, tensor in expected.state_dict().items())
