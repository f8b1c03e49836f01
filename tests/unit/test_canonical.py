"""The canonical format: bit-exact round trips, refusal of bad checkpoints, and multi-token models from Llamas."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from megamtp.checkpoint import canonical, folder, hf, safetensors_file
from megamtp.checkpoint.contents import Rearranged, Rows, resolve_defaults
from megamtp.checkpoint.tensors import InMemory, read_tensor
from megamtp.errors import CheckpointError
from megamtp.model.mtp import MTPModel
from tests.checkpoints import SMALL, STATE, VOCABULARY, with_moments


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


def llama(folder: Path, tied: bool = False, **settings) -> LlamaForCausalLM:
    """Saves a Llama with 4 layers in several files, and returns it."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        **settings,
    )
    torch.manual_seed(3)
    model = LlamaForCausalLM(config).float().eval()
    model.save_pretrained(folder, max_shard_size="40KB")
    return model


def test_folder_is_synced_before_and_its_parent_after_the_rename(tmp_path, monkeypatch):
    calls, rename = [], folder.os.rename
    monkeypatch.setattr(folder, "fsync", calls.append)
    monkeypatch.setattr(folder.os, "rename", lambda *paths: calls.append(paths) or rename(*paths))
    with folder.atomic_folder(tmp_path / "made", 5) as new:
        (new / "file").write_text("whole")
    assert calls == [new / "file", new, (new, tmp_path / "made"), tmp_path]
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "file"]


@pytest.mark.parametrize("tied", [False, True])
def test_head_1_of_a_converted_llama_computes_the_same_logits(tmp_path, tied):
    theirs = llama(tmp_path / "llama", tied)
    opened = hf.read(tmp_path / "llama", num_future_tokens=3)
    assert [("ties its unembedding" in note) for note in opened.notes] == [True] * tied
    canonical.write(opened, tmp_path / "canonical")
    contents = canonical.read(tmp_path / "canonical")
    assert (contents.model.num_layers, contents.model.num_trunk_layers, contents.model.num_future_tokens) == (6, 3, 3)
    ours = MTPModel(contents.model)
    ours.load_state_dict({name: read_tensor(contents.weights, name) for name in contents.weights.shapes}, strict=True)
    tokens = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, expected = ours.logits(tokens), theirs(tokens).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-5)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])  # heads 2 and 3 are copies


ROPE = {"rope_type": "default", "rope_theta": 500.0}


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_theta": 500.0},
        {"rope_theta": 500.0, "rope_scaling": {"type": "default"}},
        {"rope_theta": 77.0, "rope_parameters": ROPE},
        {"rope_scaling": ROPE},
        {"rope_scaling": ROPE, "rope_parameters": ROPE | {"rope_theta": 77.0}},
    ],
)
def test_rope_theta_is_read_from_the_same_key_as_by_transformers(tmp_path, settings):
    theirs = llama(tmp_path / "llama", rope_parameters=ROPE)
    path = tmp_path / "llama/config.json"
    others = {key: value for key, value in json.loads(path.read_text()).items() if not key.startswith("rope")}
    path.write_text(json.dumps(others | settings))
    assert hf.read(tmp_path / "llama").model.rope_theta == 500.0
    tokens = torch.randint(VOCABULARY, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "llama")(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("num_files", [1, 2])
def test_pickled_weights_are_read(tmp_path, num_files):
    theirs = llama(tmp_path / "llama")
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
    llama(tmp_path / "llama")
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
    llama(tmp_path / "llama")
    index = tmp_path / "llama/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": None}}))
    with pytest.raises(
        CheckpointError, match=r"index.json cannot be read \(weight_map has values that are not file names\)"
    ):
        hf.read(tmp_path / "llama")
    index.unlink()
    with pytest.raises(
        CheckpointError, match=r"has no model.safetensors; expected it, its index, or pytorch_model.bin"
    ):
        hf.read(tmp_path / "llama")


def test_rotary_frequencies_in_older_files_are_ignored(tmp_path):
    llama(tmp_path / "llama")
    index = tmp_path / "llama/model.safetensors.index.json"
    content = json.loads(index.read_text())
    save_file({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, tmp_path / "llama/old.safetensors")
    content["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = "old.safetensors"
    index.write_text(json.dumps(content))
    assert (
        hf.read(tmp_path / "llama").weights.shapes.keys()
        == MTPModel(hf.read(tmp_path / "llama").model).state_dict().keys()
    )


def test_16_bit_weights_survive_the_conversion_to_fp32(tmp_path):
    llama(tmp_path / "llama").bfloat16().save_pretrained(tmp_path / "half")
    canonical.write(hf.read(tmp_path / "half", 2), tmp_path / "canonical")
    assert read_tensor(canonical.read(tmp_path / "canonical").weights, "heads.1.mlp.up.weight").dtype == torch.float32
    hf.export(canonical.read(tmp_path / "canonical"), tmp_path / "back", torch.bfloat16)
    expected, exported = (LlamaForCausalLM.from_pretrained(tmp_path / name) for name in ("half", "back"))
    assert exported.dtype == torch.bfloat16
    assert all(torch.equal(tensor, exported.state_dict()[name]) for name, tensor in expected.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_bias": True}, "attention_bias is True, expected False"),
        ({"mlp_bias": True}, "mlp_bias is True, expected False"),
        ({"model_type": "qwen2"}, "model_type is qwen2, expected llama"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type is llama3, expected default"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type is linear, expected default",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is gelu, expected silu"),
        ({"head_dim": 16}, "head_dim is 16, expected 8"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type is linear, expected default"),
        ({"rope_parameters": "linear"}, "is 'linear'; expected a mapping"),
        ({"vocab_size": None}, "vocab_size is None; expected a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; expected a whole number of at least 1"),
        ({"num_attention_heads": True}, "num_attention_heads is True; expected a whole number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3; expected a divisor of model.num_attention_heads=4"),
        ({"rms_norm_eps": "small"}, "model.norm_eps is 'small'; expected a number"),
        ({"num_hidden_layers": 1}, "has one layer; expected two or more"),
        ({"num_hidden_layers": 5}, r"no tensor model.layers.4.input_layernorm.weight"),
        ({"num_hidden_layers": 3}, r"unknown tensor model.layers.3"),
        ({"intermediate_size": 64}, r"model.layers.0.mlp.gate_proj.weight has shape \[48, 32\], expected \[64, 32\]"),
    ],
)
def test_unsupported_architectures_and_settings_are_refused(tmp_path, settings, message):
    llama(tmp_path / "llama")
    path = tmp_path / "llama/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(CheckpointError, match=message) as caught:
        hf.read(tmp_path / "llama", 2)
    assert "\n" not in str(caught.value)


def test_rearranged_rows_are_read_by_slices():
    source = InMemory({"a": torch.arange(24.0).view(6, 2, 2), "b": torch.arange(5.0)})
    rows = torch.tensor([4, 5, 0, 1, 3])
    rearranged = Rearranged(source, {"x": Rows("a", rows), "y": Rows("b")})
    assert rearranged.shapes == {"x": (5, 2, 2), "y": (5,)}
    expected = source.weights["a"][rows].flatten()
    for start in range(len(expected) + 1):
        for end in (*range(start, len(expected) + 1), None):
            assert torch.equal(rearranged.read("x", start, end), expected[start:end])
    assert torch.equal(rearranged.read("y", 1, 3), torch.tensor([1.0, 2.0]))


def test_missing_tokenizer_is_named(tmp_path):
    source = dataclasses.replace(with_moments(SMALL), tokenizer=tmp_path / "tokenizer.model")
    with pytest.raises(
        CheckpointError, match=r"tokenizer.model cannot be read \(No such file or directory\); correct data.tokenizer"
    ):
        canonical.write(source, tmp_path / "canonical")
    assert not list(tmp_path.iterdir())
