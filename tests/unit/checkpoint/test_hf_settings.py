"""Reading config.json of transformers: its settings, and refusal of unsupported models."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from megamtp.checkpoint import hf, hf_tokenizer
from megamtp.errors import CheckpointError
from tests.checkpoints import SMALL, VOCABULARY, contents, random_model
from tests.llama import save_llama

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
    theirs = save_llama(tmp_path / "llama", rope_parameters=ROPE)
    path = tmp_path / "llama/config.json"
    others = {key: value for key, value in json.loads(path.read_text()).items() if not key.startswith("rope")}
    path.write_text(json.dumps(others | settings))
    assert hf.read(tmp_path / "llama").model.rope_theta == 500.0
    tokens = torch.randint(VOCABULARY, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "llama")(tokens).logits, theirs(tokens).logits)


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
    save_llama(tmp_path / "llama")
    path = tmp_path / "llama/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(CheckpointError, match=message) as caught:
        hf.read(tmp_path / "llama", 2)
    assert "\n" not in str(caught.value)


@pytest.fixture
def exported(tmp_path) -> Path:
    hf.export(contents(SMALL, random_model(SMALL).state_dict()), tmp_path / "exported")
    return tmp_path / "exported"


@pytest.mark.parametrize("key", ["hidden_size", "model_type", "rms_norm_eps"])
def test_config_without_a_key_is_refused(exported, key):
    settings = json.loads((exported / "config.json").read_text())
    del settings[key]
    (exported / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=key):
        hf.read(exported)


def test_note_about_a_tokenizer_that_is_not_carried_over(exported):
    assert not hf.read(exported).notes
    (exported / "tokenizer.json").write_text(json.dumps({"long": "x" * hf_tokenizer.LARGEST_BYTE_TOKENIZER}))
    read = hf.read(exported)
    assert read.tokenizer is None
    (note,) = read.notes
    assert "has a tokenizer, but no SentencePiece model of at most 300 pieces" in note
