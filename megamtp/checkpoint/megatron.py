"""Reads Megatron-LM's checkpoints of Llama models without model parallelism, to start a multi-token model from them.

    FOLDER/latest_checkpointed_iteration.txt
    FOLDER/iter_0000100/mp_rank_00/model_optim_rng.pt    "model": weights by Megatron-Core's names, "args": settings

Queries, keys and values are fused into one matrix: for each group of attention heads the queries, then the key, then
the value. The gate and up matrices of SwiGLU are also fused.

Source: Megatron-LM, tools/checkpoint/schema_core.py and loader_llama_mistral.py.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from megamtp.checkpoint import torch_file
from megamtp.checkpoint.contents import WEIGHT, Contents, Rearranged, Rows, check_model, check_tensors, positive_integer
from megamtp.checkpoint.folder import read_name
from megamtp.checkpoint.tensors import InMemory
from megamtp.config import ModelConfig
from megamtp.errors import CheckpointError

LATEST, FILE, DISTRIBUTED = "latest_checkpointed_iteration.txt", "model_optim_rng.pt", "common.pt"
# Objects of classes in these modules are replaced by placeholders: see torch_file.read.
OPAQUE = ("megatron.", "transformer_engine.", "argparse.", "numpy.", "_io.")
EXTRA_STATE = "_extra_state"  # Transformer Engine's scales of fp8 products

# The values in args that the model must have. A missing setting counts as this value, because older versions of
# Megatron-LM did not have the setting.
REQUIRED_SETTINGS = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "position_embedding_type": "rope",
    "swiglu": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "num_experts": None,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "use_rope_scaling": False,
    "rotary_seq_len_interpolation_factor": None,
    "qk_layernorm": False,
    "apply_layernorm_1p": False,
    "apply_query_key_layer_scaling": False,
    "apply_residual_connection_post_layernorm": False,
    "mtp_num_layers": None,
    "multi_latent_attention": False,
    "window_size": None,
    "no_rope_freq": None,
    "softmax_type": "vanilla",
    "glu_linear_offset": 0.0,
}
DEFAULT_ROTARY_BASE = 10000  # the value in Megatron versions without the argument
MUST_BE_PRESENT = ("position_embedding_type", "swiglu", "normalization", "add_bias_linear")

EMBEDDING, FINAL_NORM = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight"
OUTPUT = "output_layer.weight"
QUERY_KEY_VALUE, GATE_UP = "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"
# The norms of attention and SwiGLU, fused as with Transformer Engine (True) or not (False).
NORMS = {
    True: ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"),
    False: ("input_layernorm.weight", "pre_mlp_layernorm.weight"),
}


def read(directory: Path, num_future_tokens: int = 1) -> Contents:
    """Opens a checkpoint as a model with `num_future_tokens` heads.

    The last layer becomes head 1, and heads 2 to n are copies of it, as in hf.read.

    Raises:
        CheckpointError: a file is missing or unreadable, the architecture is not supported, or a tensor is missing, has
            a wrong shape, or is unknown.
    """
    path = _weights_file(directory)
    saved = torch_file.read(path, OPAQUE)
    if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict) or "args" not in saved:
        raise CheckpointError(
            f"{path} has no model and args; expected Megatron-LM's checkpoint without tensor or pipeline parallelism"
        )
    args = getattr(saved["args"], "__dict__", {})
    _check_settings(args, path)
    tensors = {name: tensor for name, tensor in saved["model"].items() if not name.endswith(EXTRA_STATE)}
    torch_file.require_tensors(path, tensors)
    fused_norms = any(name.endswith(NORMS[True][0]) for name in tensors)
    tied = not args.get("untie_embeddings_and_output_weights", False)
    model = _model(args, path, num_future_tokens)
    expected = _shapes(model, fused_norms) | ({} if tied else {OUTPUT: (model.vocab_size, model.dim)})
    check_tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected, path)
    notes = [f"{path} ties its unembedding to its embedding: the result has separate weights for both"] if tied else []
    if args.get("vocab_size") not in (None, model.vocab_size):
        notes.append(
            f"{path} has a vocabulary of {args['vocab_size']}, padded to {model.vocab_size}: the padding is kept"
        )
    return Contents(
        model,
        {WEIGHT: Rearranged(InMemory(tensors), _rows(model, fused_norms, tied))},
        sequence_length=args.get("seq_length"),
        notes=tuple(notes),
    )


def is_megatron(path: Path) -> bool:
    """Returns whether this is a checkpoint folder of Megatron-LM, or the folder of one iteration or rank in it."""
    return any((path / name).exists() for name in (LATEST, FILE, f"mp_rank_00/{FILE}"))


def _weights_file(directory: Path) -> Path:
    if (directory / FILE).exists():
        return directory / FILE
    folder = directory
    if (directory / LATEST).exists():
        iteration = read_name(directory / LATEST)
        folder = directory / (f"iter_{int(iteration):07d}" if iteration.isdecimal() else iteration)
    if (folder / DISTRIBUTED).exists():
        raise CheckpointError(
            f"{folder} is in Megatron-LM's distributed format; expected the format torch: convert it with Megatron-LM"
        )
    ranks = sorted(path.name for path in folder.glob("mp_rank_*"))
    if ranks != ["mp_rank_00"]:
        raise CheckpointError(
            f"{folder} has {ranks or 'no ranks'}; expected only mp_rank_00: convert it with Megatron-LM to TP = PP = 1"
        )
    return folder / "mp_rank_00" / FILE


def _check_settings(args: dict[str, Any], path: Path) -> None:
    for key in MUST_BE_PRESENT:
        if key not in args:
            raise CheckpointError(f"{path}: args have no {key}; expected {REQUIRED_SETTINGS[key]}")
    for key, expected in REQUIRED_SETTINGS.items():
        value = args.get(key, expected)
        if value != expected and not (expected in (None, False) and not value):
            raise CheckpointError(f"{path}: args.{key} is {value}, expected {expected}: unsupported architecture")


def _model(args: dict[str, Any], path: Path, num_future_tokens: int) -> ModelConfig:
    keys = ("hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size", "padded_vocab_size")
    dim, num_layers, num_attention_heads, mlp_dim, vocab_size = (positive_integer(args, key, path) for key in keys)
    model = ModelConfig(
        dim=dim,
        num_layers=num_layers - 1 + num_future_tokens,
        num_future_tokens=num_future_tokens,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=args.get("num_query_groups") if args.get("group_query_attention") else None,
        mlp_dim=mlp_dim,
        vocab_size=vocab_size,
        rope_theta=args.get("rotary_base", DEFAULT_ROTARY_BASE),
        # layernorm_epsilon is the name in older versions of Megatron
        norm_eps=cast("float", args.get("norm_epsilon", args.get("layernorm_epsilon"))),
    )
    if args.get("kv_channels") not in (None, model.head_dim):
        raise CheckpointError(
            f"{path}: args.kv_channels is {args['kv_channels']}, expected {model.head_dim}: unsupported architecture"
        )
    if num_layers < 2:
        raise CheckpointError(
            f"{path} has one layer; expected two or more: the last becomes head 1, the others the trunk"
        )
    return check_model(model, path)


def _shapes(model: ModelConfig, fused_norms: bool) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all tensors except the output layer, by Megatron's names."""
    fused_dim = (model.num_attention_heads + 2 * model.key_value_heads) * model.head_dim
    attention_norm, mlp_norm = NORMS[fused_norms]
    layer_shapes = {
        attention_norm: (model.dim,),
        QUERY_KEY_VALUE: (fused_dim, model.dim),
        "self_attention.linear_proj.weight": (model.dim, model.dim),
        mlp_norm: (model.dim,),
        GATE_UP: (2 * model.hidden_dim, model.dim),
        "mlp.linear_fc2.weight": (model.dim, model.hidden_dim),
    }
    shapes = {EMBEDDING: (model.vocab_size, model.dim), FINAL_NORM: (model.dim,)}
    for layer in range(model.num_trunk_layers + 1):
        shapes |= {f"decoder.layers.{layer}.{name}": shape for name, shape in layer_shapes.items()}
    return shapes


def _rows(model: ModelConfig, fused_norms: bool, tied: bool) -> dict[str, Rows]:
    """Returns {MTPModel's name: the corresponding rows of one of Megatron's tensors}."""
    attention_norm, mlp_norm = NORMS[fused_norms]
    query, key, value = _attention_rows(model)
    layer_rows = {
        "attention_norm.weight": Rows(attention_norm),
        "attention.query.weight": Rows(QUERY_KEY_VALUE, query),
        "attention.key.weight": Rows(QUERY_KEY_VALUE, key),
        "attention.value.weight": Rows(QUERY_KEY_VALUE, value),
        "attention.output.weight": Rows("self_attention.linear_proj.weight"),
        "mlp_norm.weight": Rows(mlp_norm),
        "mlp.gate.weight": Rows(GATE_UP, torch.arange(model.hidden_dim)),
        "mlp.up.weight": Rows(GATE_UP, torch.arange(model.hidden_dim, 2 * model.hidden_dim)),
        "mlp.down.weight": Rows("mlp.linear_fc2.weight"),
    }
    layers = {f"trunk.{index}": index for index in range(model.num_trunk_layers)}
    layers |= {f"heads.{index}": model.num_trunk_layers for index in range(model.num_future_tokens)}
    return {
        "embedding.weight": Rows(EMBEDDING),
        "unembedding.norm": Rows(FINAL_NORM),
        "unembedding.weight": Rows(EMBEDDING if tied else OUTPUT),
    } | {
        f"{ours}.{name}": Rows(f"decoder.layers.{theirs}.{selection.name}", selection.rows)
        for ours, theirs in layers.items()
        for name, selection in layer_rows.items()
    }


def _attention_rows(model: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the rows of queries, keys and values in the fused matrix."""
    queries_per_group = model.num_attention_heads // model.key_value_heads
    rows = torch.arange((model.num_attention_heads + 2 * model.key_value_heads) * model.head_dim)
    rows = rows.view(model.key_value_heads, queries_per_group + 2, model.head_dim)
    return (
        rows[:, :queries_per_group].flatten(),
        rows[:, queries_per_group].flatten(),
        rows[:, queries_per_group + 1].flatten(),
    )
