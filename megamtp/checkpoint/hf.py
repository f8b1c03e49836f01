"""Trunk and head 1 as a LlamaForCausalLM folder of transformers, and any such folder as the beginning of a multi-token model.

    export(contents, Path("exported"))
    contents = read(Path("exported"))                          # the ordinary next-token model
    contents = read(Path("llama"), num_future_tokens=4)        # its last layer is head 1; heads 2 to 4 are copies of it

Head 1 is the last layer; heads 2 to n stay behind, being no part of that architecture. Versions 4 and 5 of transformers
load it.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megamtp.checkpoint import safetensors_file
from megamtp.checkpoint.contents import WEIGHT, Contents, check_contents, check_tensors, parameter_shapes, renamed
from megamtp.checkpoint.folder import published, write_json
from megamtp.checkpoint.hf_tokenizer import (
    BYTES_END,
    TOKENIZER,
    are_bytes,
    fits,
    read_tokenizer,
    write_byte_tokenizer,
    write_tokenizer,
)
from megamtp.checkpoint.safetensors_file import SafetensorsFiles
from megamtp.checkpoint.tensors import TensorSource
from megamtp.config import ModelConfig
from megamtp.errors import CheckpointError

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"  # the index only beside weights in several files
LARGEST_FILE_BYTES = 5 * 10**9
DEFAULT_ROPE_THETA = 10000.0  # of a config.json that does not say: transformers' own
DEFAULT_POSITIONS = 4096  # of an export of weights that do not say on how many they were trained

DERIVED = ".self_attn.rotary_emb.inv_freq"  # in older files; computed from the settings, as transformers does, which leaves it out

# MTPModel's names -> LlamaForCausalLM's. Both write rotary pairs as (k, k + K/2), so no row of a matrix moves.
OUTER_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "unembedding.norm": "model.norm.weight",
    "unembedding.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}


def export(contents: Contents, directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes the folder in a temporary one beside `directory` and renames it: what bears the final name is whole.

    Args:
        directory: new, empty, or an earlier export, which is replaced.
        dtype: of the weights, in files of at most 5 GB.

    Raises:
        CheckpointError: the destination holds something else or cannot be written, a weight is missing, misshaped
            or unknown, or transformers cannot reproduce the tokenizer.
    """
    check_contents(contents, "the checkpoint")
    weights = renamed(contents.weights, {theirs: ours for ours, theirs in names_of(contents.model).items()})
    with published(directory, num_bytes(weights, dtype), replaceable=True) as folder:
        write_settings(folder, contents, dtype, {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
        write_weights(folder, weights, dtype)


def read(directory: Path, num_future_tokens: int = 1) -> Contents:
    """A LlamaForCausalLM folder without biases, as the beginning of a model of so many heads.

    The trunk is all its layers but the last, which is head 1, and of which heads 2 to n are copies; so head 1 computes what the
    whole model did. Norm and unembedding are its own. A copy, rather than new weights, puts every head where the unembedding can
    read its output already.

    Raises:
        CheckpointError: a file is missing or unreadable, the model is of another form, or a tensor is missing,
            misshaped or unknown (the message names it).
    """
    settings = read_settings(directory)
    model = model_config(settings, directory, num_future_tokens)
    found = open_weights(directory)
    names, notes = names_of(model, copies=True), ()
    if settings.get("tie_word_embeddings") and OUTER_NAMES["unembedding.weight"] not in found.shapes:
        names["unembedding.weight"] = OUTER_NAMES["embedding.weight"]
        notes = (f"{directory} ties its unembedding to its embedding: from here on each has weights of its own",)
    shapes = parameter_shapes(model)
    found_shapes = {name: shape for name, shape in found.shapes.items() if not name.endswith(DERIVED)}
    check_tensors(found_shapes, {theirs: shapes[ours] for ours, theirs in names.items()}, directory)
    return contents_of(directory, settings, model, renamed(found, names), notes)


def contents_of(
    directory: Path, settings: dict[str, Any], model: ModelConfig, weights: TensorSource, notes: tuple[str, ...] = ()
) -> Contents:
    """What a folder of transformers with these `weights` holds, its tokenizer included."""
    tokenizer = directory / TOKENIZER
    return Contents(
        model,
        {WEIGHT: weights},
        sequence_length=settings.get("max_position_embeddings"),
        tokenizer=tokenizer if fits(tokenizer, model.vocab_size) else None,
        tokens_are_bytes=are_bytes(directory, model.vocab_size),
        notes=notes,
    )


def names_of(model: ModelConfig, copies: bool = False) -> dict[str, str]:
    """MTPModel's name -> LlamaForCausalLM's, of all that is exported; with `copies`, heads 2 to n have the names of head 1."""
    layers = [(f"trunk.{index}", index) for index in range(model.num_trunk_layers)]
    heads = range(model.num_future_tokens if copies else 1)
    layers += [(f"heads.{index}", model.num_trunk_layers) for index in heads]
    return OUTER_NAMES | {
        f"{layer}.{ours}": f"model.layers.{number}.{theirs}" for layer, number in layers for ours, theirs in LAYER_NAMES.items()
    }


def num_bytes(weights: TensorSource, dtype: torch.dtype) -> int:
    """What the tensors take on disk."""
    return sum(map(math.prod, weights.shapes.values())) * dtype.itemsize


def write_settings(folder: Path, contents: Contents, dtype: torch.dtype, architecture: Mapping[str, Any]) -> None:
    """config.json, generation_config.json and the tokenizer.

    Args:
        architecture: what config.json says beside the numbers of trunk and head 1.
    """
    model = contents.model
    sequence_length = contents.sequence_length or DEFAULT_POSITIONS
    tokenizer = read_tokenizer(contents.tokenizer, model.vocab_size) if contents.tokenizer else None
    # Documents follow each other's end piece in training, so that piece, not <s>, is what a text begins with.
    end_id = tokenizer.eos_id() if tokenizer else BYTES_END if contents.tokens_are_bytes else None
    ids = {"bos_token_id": end_id, "eos_token_id": end_id}
    config = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": model.hidden_dim,
        "num_hidden_layers": model.num_trunk_layers + 1,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.key_value_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": sequence_length,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    write_json(folder / CONFIG, {**architecture, **config, **ids})
    write_json(folder / "generation_config.json", ids)
    if tokenizer:
        write_tokenizer(folder, tokenizer, sequence_length)
    elif contents.tokens_are_bytes:
        write_byte_tokenizer(folder, sequence_length)


def write_weights(folder: Path, weights: TensorSource, dtype: torch.dtype) -> None:
    """All tensors, in files of at most 5 GB as transformers names them."""
    files = safetensors_file.split(weights.shapes, dtype.itemsize, LARGEST_FILE_BYTES)
    stem, suffix = WEIGHTS.split(".")
    names = [f"{stem}-{number:05d}-of-{len(files):05d}.{suffix}" for number in range(1, len(files) + 1)]
    names = names if len(files) > 1 else [WEIGHTS]
    for name, tensors in zip(names, files, strict=True):
        safetensors_file.write(folder / name, weights, tensors, dtype)
    if len(files) > 1:
        weight_map = {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
        write_json(folder / INDEX, {"metadata": {"total_size": num_bytes(weights, dtype)}, "weight_map": weight_map})


def read_settings(directory: Path) -> dict[str, Any]:
    """config.json. Raises CheckpointError."""
    try:
        settings = json.loads((directory / CONFIG).read_text())
        if not isinstance(settings, dict):
            raise ValueError("no mapping")
        return settings
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory} is no model of transformers or a damaged one ({error}); copy it again") from None


def open_weights(directory: Path) -> SafetensorsFiles:
    """The tensors of a folder of transformers under its own names. Raises CheckpointError."""
    index = directory / INDEX
    if not index.exists():
        return SafetensorsFiles([directory / WEIGHTS])
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} cannot be read ({error}); copy it again") from None
    found = SafetensorsFiles(directory / file for file in sorted(set(weight_map.values())))
    for name, file in weight_map.items():
        if name not in found.shapes:
            raise CheckpointError(f"{directory / file} has no tensor {name}; expected it there by {INDEX}")
    return found


def model_config(settings: dict[str, Any], directory: Path, num_future_tokens: int, model_type: str = "llama") -> ModelConfig:
    """The model that config.json tells of, with so many heads, head 1 being its last layer.

    Raises:
        CheckpointError: it is of another form, or a setting is missing.
    """
    _check_form(settings, directory, model_type)
    rope = settings.get("rope_parameters") or {}  # where transformers 5 puts it
    try:
        model = ModelConfig(
            dim=settings["hidden_size"],
            num_layers=settings["num_hidden_layers"] - 1 + num_future_tokens,
            num_future_tokens=num_future_tokens,
            num_attention_heads=settings["num_attention_heads"],
            num_key_value_heads=settings.get("num_key_value_heads"),
            mlp_dim=settings["intermediate_size"],
            vocab_size=settings["vocab_size"],
            rope_theta=settings.get("rope_theta", rope.get("rope_theta", DEFAULT_ROPE_THETA)),
            norm_eps=settings["rms_norm_eps"],
        )
    except KeyError as error:
        raise CheckpointError(f"{directory}/{CONFIG} has no {error}; expected all settings of a Llama: mend it") from None
    if model.num_trunk_layers < 1:
        raise CheckpointError(f"{directory} has one layer; expected two or more: the last becomes head 1, the others the trunk")
    return model


def _check_form(settings: dict[str, Any], directory: Path, model_type: str) -> None:
    """Raises: CheckpointError if the model computes anything else than MTPModel with one head."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}  # transformers 5, 4
    found = {
        "model_type": settings.get("model_type"),
        "hidden_act": settings.get("hidden_act", "silu"),
        "rope_type": rope.get("rope_type") or rope.get("type") or "default",
        "partial_rotary_factor": rope.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0)),
        "attention_bias": settings.get("attention_bias", False),
        "mlp_bias": settings.get("mlp_bias", False),
        "quantization_config": settings.get("quantization_config"),
    }
    expected = {
        "model_type": model_type, "hidden_act": "silu", "rope_type": "default", "partial_rotary_factor": 1.0,
        "attention_bias": False, "mlp_bias": False, "quantization_config": None,
    }  # fmt: skip
    try:
        width = settings["hidden_size"] // settings["num_attention_heads"]
        found["head_dim"], expected["head_dim"] = settings.get("head_dim") or width, width
    except KeyError:
        pass  # named when the model is described
    for key, value in found.items():
        if value != expected[key]:
            raise CheckpointError(f"{directory}/{CONFIG}: {key} is {value}, expected {expected[key]}: another form of model")
