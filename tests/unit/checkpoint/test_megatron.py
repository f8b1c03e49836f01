"""Megatron-LM's checkpoints: fused weights are split bit-exactly, and unsupported checkpoints are refused."""

import argparse
import dataclasses
import enum
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from megamtp.checkpoint import megatron
from megamtp.checkpoint.contents import resolve_defaults
from megamtp.checkpoint.tensors import read_tensor
from megamtp.errors import CheckpointError
from megamtp.model.mtp import MTPModel
from tests.checkpoints import SMALL, random_model

CONFIG = dataclasses.replace(SMALL, num_layers=3, num_future_tokens=1)
LAYERS = ["trunk.0", "trunk.1", "heads.0"]


def settings(**changes) -> argparse.Namespace:
    known = {
        "hidden_size": 32,
        "num_layers": 3,
        "num_attention_heads": 4,
        "group_query_attention": True,
        "num_query_groups": 2,
        "kv_channels": 8,
        "ffn_hidden_size": 48,
        "padded_vocab_size": 300,
        "vocab_size": 290,
        "rotary_base": 500,
        "norm_epsilon": 1e-3,
        "position_embedding_type": "rope",
        "swiglu": True,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "untie_embeddings_and_output_weights": True,
        "seq_length": 64,
        "params_dtype": torch.bfloat16,
        "num_experts": None,
    }
    return argparse.Namespace(**known | changes)


def fused(model: MTPModel, with_engine: bool) -> dict[str, torch.Tensor]:
    """Returns the same weights in the form of Megatron-Core, with or without Transformer Engine."""
    ours = model.state_dict()
    groups, dim = CONFIG.key_value_heads, CONFIG.dim
    weights = {
        "embedding.word_embeddings.weight": ours["embedding.weight"],
        "decoder.final_layernorm.weight": ours["unembedding.norm"],
        "output_layer.weight": ours["unembedding.weight"],
    }
    for index, layer in enumerate(LAYERS):
        matrices = [ours[f"{layer}.attention.{kind}.weight"] for kind in ("query", "key", "value")]
        query_key_value = torch.cat([matrix.reshape(groups, -1, dim) for matrix in matrices], dim=1).reshape(-1, dim)
        gate_up = torch.cat((ours[f"{layer}.mlp.gate.weight"], ours[f"{layer}.mlp.up.weight"]))
        norms = ["self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"]
        norms = norms if with_engine else ["input_layernorm.weight", "pre_mlp_layernorm.weight"]
        layer_weights = {
            norms[0]: ours[f"{layer}.attention_norm.weight"],
            norms[1]: ours[f"{layer}.mlp_norm.weight"],
            "self_attention.linear_qkv.weight": query_key_value,
            "self_attention.linear_proj.weight": ours[f"{layer}.attention.output.weight"],
            "mlp.linear_fc1.weight": gate_up,
            "mlp.linear_fc2.weight": ours[f"{layer}.mlp.down.weight"],
        }
        weights |= {f"decoder.layers.{index}.{name}": tensor.clone() for name, tensor in layer_weights.items()}
        if with_engine:
            weights[f"decoder.layers.{index}.mlp.linear_fc1._extra_state"] = None
    return weights


def save(folder: Path, weights: dict, args: argparse.Namespace, **more) -> None:
    path = folder / "iter_0000100/mp_rank_00/model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("100")
    torch.save({"args": args, "model": weights, "iteration": 100, "checkpoint_version": 3.0, **more}, path)


@pytest.fixture
def foreign_enum(monkeypatch) -> enum.Enum:
    """Returns a value of a class whose module exists only while the checkpoint is saved."""
    module = types.ModuleType("megatron.enums")
    module.Backend = enum.Enum("Backend", {"flash": 1}, module="megatron.enums")
    monkeypatch.setitem(sys.modules, "megatron", types.ModuleType("megatron"))
    monkeypatch.setitem(sys.modules, "megatron.enums", module)
    return module.Backend.flash


@pytest.mark.parametrize("with_engine", [True, False])
def test_fused_weights_are_split_bit_exactly(tmp_path, monkeypatch, foreign_enum, with_engine):
    model = random_model(CONFIG)
    random_states = [{"np_rng_state": np.random.get_state(), "torch_rng_state": torch.get_rng_state()}]
    save(
        tmp_path / "megatron",
        fused(model, with_engine),
        settings(attention_backend=foreign_enum),
        rng_state=random_states,
    )
    monkeypatch.delitem(sys.modules, "megatron.enums")
    monkeypatch.delitem(sys.modules, "megatron")
    read = megatron.read(tmp_path / "megatron", num_future_tokens=3)
    assert read.model == dataclasses.replace(resolve_defaults(CONFIG), num_layers=5, num_future_tokens=3)
    assert (read.sequence_length, ["padded to 300" in note for note in read.notes]) == (64, [True])
    expected = model.state_dict()
    for name in read.weights.shapes:
        source = name.replace("heads.1.", "heads.0.").replace("heads.2.", "heads.0.")
        assert torch.equal(read_tensor(read.weights, name), expected[source]), name
    MTPModel(read.model).load_state_dict(
        {name: read_tensor(read.weights, name) for name in read.weights.shapes}, strict=True
    )


def test_tied_unembedding_is_untied_with_a_note(tmp_path):
    weights = fused(random_model(CONFIG), True)
    del weights["output_layer.weight"]
    save(tmp_path / "megatron", weights, settings(untie_embeddings_and_output_weights=False, vocab_size=None))
    read = megatron.read(tmp_path / "megatron")
    assert ["ties its unembedding" in note for note in read.notes] == [True]
    assert torch.equal(read_tensor(read.weights, "unembedding.weight"), weights["embedding.word_embeddings.weight"])


def test_arguments_of_older_megatron_versions_are_read(tmp_path):
    """They have no rotary_base, and another name for norm_epsilon."""
    older = settings(layernorm_epsilon=1e-6)
    del older.rotary_base, older.norm_epsilon
    save(tmp_path / "megatron", fused(random_model(CONFIG), False), older)
    model = megatron.read(tmp_path / "megatron").model
    assert (model.rope_theta, model.norm_eps) == (10000, 1e-6)


def test_invalid_latest_iteration_is_refused_in_one_line(tmp_path):
    save(tmp_path / "megatron", {}, settings())
    for content in ("²".encode(), b"\xff\xfe", b"x" * 300, b"9" * 5000, b"../\0", b""):
        (tmp_path / "megatron/latest_checkpointed_iteration.txt").write_bytes(content)
        with pytest.raises(
            CheckpointError, match=r"^[^\n]*(latest_checkpointed_iteration.txt cannot be read|has no ranks)[^\n]*$"
        ):
            megatron.read(tmp_path / "megatron")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_bias_linear": True}, "add_bias_linear is True, expected False"),
        ({"add_qkv_bias": True}, "add_qkv_bias is True, expected False"),
        ({"tensor_model_parallel_size": 2}, "tensor_model_parallel_size is 2, expected 1"),
        ({"num_experts": 8}, "num_experts is 8, expected None"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type is learned_absolute, expected rope"),
        ({"rotary_interleaved": True}, "rotary_interleaved is True"),
        ({"normalization": "LayerNorm"}, "normalization is LayerNorm, expected RMSNorm"),
        ({"window_size": (127, 0)}, r"window_size is \(127, 0\), expected None"),
        ({"no_rope_freq": 4}, "no_rope_freq is 4, expected None"),
        ({"softmax_type": "learnable"}, "softmax_type is learnable, expected vanilla"),
        ({"kv_channels": 16}, "kv_channels is 16, expected 8"),
        ({"rotary_base": None}, "model.rope_theta is None; expected a number"),
        ({"hidden_size": None}, "hidden_size is None; expected a whole number"),
        ({"num_layers": 4}, r"no tensor decoder.layers.3.self_attention.linear_qkv.layer_norm_weight"),
        ({"num_layers": 2}, r"unknown tensor decoder.layers.2"),
        ({"ffn_hidden_size": 64}, r"decoder.layers.0.mlp.linear_fc1.weight has shape \[96, 32\], expected \[128, 32\]"),
    ],
)
def test_unsupported_architectures_and_settings_are_refused(tmp_path, changes, message):
    save(tmp_path / "megatron", fused(random_model(CONFIG), True), settings(**changes))
    with pytest.raises(CheckpointError, match=message) as caught:
        megatron.read(tmp_path / "megatron")
    assert "\n" not in str(caught.value)


def test_model_parallel_and_distributed_checkpoints_are_refused(tmp_path):
    save(tmp_path / "megatron", {}, settings())
    (tmp_path / "megatron/iter_0000100/mp_rank_01").mkdir()
    with pytest.raises(CheckpointError, match=r"mp_rank_01.*TP = PP = 1"):
        megatron.read(tmp_path / "megatron")
    (tmp_path / "megatron/iter_0000100/common.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="distributed format"):
        megatron.read(tmp_path / "megatron")
