"""The files of a transformers folder besides weights: config.json, generation_config.json and the tokenizer's files."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megamtp.checkpoint.contents import WEIGHT, Contents, check_model, positive_integer
from megamtp.checkpoint.folder import write_json
from megamtp.checkpoint.hf_tokenizer import (
    BYTES_END,
    TOKENIZER,
    fits_vocabulary,
    is_byte_tokenizer,
    read_tokenizer,
    write_byte_tokenizer,
    write_tokenizer,
)
from megamtp.checkpoint.special_ids import read_special_ids, special_ids_of, write_special_ids
from megamtp.checkpoint.tensors import TensorSource
from megamtp.config import ModelConfig
from megamtp.data.tokenizer import SentencePieceTokenizer
from megamtp.errors import CheckpointError
from megamtp.model.heads import head_order

CONFIG = "config.json"
DEFAULT_ROPE_THETA = 10000.0  # the default of transformers
DEFAULT_POSITIONS = 4096  # exported if the sequence length of training is unknown


def write_settings(folder: Path, contents: Contents, dtype: torch.dtype, architecture: Mapping[str, Any]) -> None:
    """Writes config.json, generation_config.json and the tokenizer.

    Args:
        architecture: settings of config.json besides those of a Llama.
    """
    model = contents.model
    sequence_length = contents.sequence_length or DEFAULT_POSITIONS
    tokenizer = read_tokenizer(contents.tokenizer, model.vocab_size) if contents.tokenizer else None
    # In training, every document except the first follows an end piece, so a text begins with that piece, not with <s>.
    end_id = tokenizer.end_of_document_id if tokenizer else BYTES_END if contents.tokens_are_bytes else None
    ids: dict[str, int | list[int] | None] = {"bos_token_id": end_id, "eos_token_id": end_id}
    ids |= contents.special_ids if end_id is None else {}
    config = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": model.hidden_dim,
        "num_hidden_layers": len(llama_layers(model)),
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
    write_special_ids(folder, ids)
    if tokenizer:
        write_tokenizer(folder, tokenizer, sequence_length)
    elif contents.tokens_are_bytes:
        write_byte_tokenizer(folder, sequence_length)


def llama_layers(model: ModelConfig) -> list[str]:
    """Returns MTPModel's names of the layers that run one after another up to head 1: those of a Llama.

    If head 1 is a matrix, these are the layers of the trunk.
    """
    order = head_order(model)
    heads = order[: order.index(0) + 1] if model.head_kind != "linear" or model.first_head == "layer" else ()
    return [f"trunk.{index}" for index in range(model.num_trunk_layers)] + [f"heads.{index}" for index in heads]


def read_settings(directory: Path) -> dict[str, Any]:
    """Reads config.json. Raises CheckpointError."""
    try:
        settings = json.loads((directory / CONFIG).read_text())
        if not isinstance(settings, dict):
            raise ValueError("not a mapping")
        return settings
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory} is not a model of transformers, or it is damaged ({error}); copy it again"
        ) from None


def make_contents(
    directory: Path, settings: dict[str, Any], model: ModelConfig, weights: TensorSource, notes: tuple[str, ...] = ()
) -> Contents:
    """Returns the contents of a transformers folder: `weights`, and its tokenizer or its special ids.

    The special ids are read only if the folder has no usable tokenizer.

    Raises:
        CheckpointError: generation_config.json, or a number in config.json, is damaged.
    """
    positions, tokenizer = "max_position_embeddings", directory / TOKENIZER
    in_bytes = is_byte_tokenizer(directory, model.vocab_size)
    usable, special_ids = fits_vocabulary(tokenizer, model.vocab_size), {}
    if not usable and not in_bytes:
        special_ids = special_ids_of(settings, model.vocab_size) | read_special_ids(directory, model.vocab_size)
    if not usable and not in_bytes and (tokenizer.exists() or (directory / "tokenizer.json").exists()):
        kept = ", ".join(f"{key} {value}" for key, value in special_ids.items())
        notes += (
            f"{directory} has a tokenizer, but no SentencePiece model of at most {model.vocab_size} pieces: it is not "
            "copied" + (f", {kept} are kept" if kept else ""),
        )
    if usable and (num_pieces := SentencePieceTokenizer(tokenizer).vocab_size) < model.vocab_size:
        notes += (
            f"{tokenizer} has {num_pieces} pieces, but the model has {model.vocab_size} rows: ids from {num_pieces} on "
            "have no text",
        )
    return Contents(
        model,
        {WEIGHT: weights},
        sequence_length=positive_integer(settings, positions, directory / CONFIG) if positions in settings else None,
        tokenizer=tokenizer if usable else None,
        tokens_are_bytes=in_bytes,
        special_ids=special_ids,
        notes=notes,
    )


def model_config(
    settings: dict[str, Any],
    directory: Path,
    num_future_tokens: int,
    model_type: str = "llama",
    head_settings: Mapping[str, Any] | None = None,
) -> ModelConfig:
    """Returns the model that config.json describes, with `num_future_tokens` heads.

    Args:
        head_settings: fields of ModelConfig that say what the heads are; None or empty: the last layer is head 1, and
            the heads are parallel.

    Raises:
        CheckpointError: the architecture is not supported, or a setting is missing or wrong.
    """
    path = directory / CONFIG
    rope = _rope(settings, path)
    _check_architecture(settings, rope, path, model_type)
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    dim, num_layers, num_attention_heads, mlp_dim, vocab_size = (positive_integer(settings, key, path) for key in keys)
    if "rms_norm_eps" not in settings:
        raise CheckpointError(f"{path} has no rms_norm_eps; expected all settings of a Llama: add it")
    if num_layers < 2 and not head_settings:
        raise CheckpointError(
            f"{directory} has one layer; expected two or more: the last becomes head 1, the others the trunk"
        )
    model = ModelConfig(
        dim=dim,
        num_layers=num_layers - 1 + num_future_tokens,
        num_future_tokens=num_future_tokens,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=settings.get("num_key_value_heads"),
        mlp_dim=mlp_dim,
        vocab_size=vocab_size,
        rope_theta=rope.get("rope_theta", settings.get("rope_theta", DEFAULT_ROPE_THETA)),
        norm_eps=settings["rms_norm_eps"],
    )
    _require(path, "head_dim", settings.get("head_dim") or model.head_dim, model.head_dim)
    model = check_model(dataclasses.replace(model, **head_settings or {}), path)
    _require(path, "num_hidden_layers", num_layers, len(llama_layers(model)))
    return model


def _rope(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns the settings of the rotary embedding. rope_scaling is read first, as in transformers 5."""
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{path}: rope_scaling or rope_parameters is {rope!r}; expected a mapping: correct it")
    return rope


def _check_architecture(settings: dict[str, Any], rope: dict[str, Any], path: Path, model_type: str) -> None:
    """Raises CheckpointError if the model does not compute the same as MTPModel with one head."""
    _require(path, "model_type", settings.get("model_type"), model_type)
    _require(path, "hidden_act", settings.get("hidden_act", "silu"), "silu")
    _require(path, "rope_type", rope.get("rope_type") or rope.get("type") or "default", "default")
    fraction = rope.get("partial_rotary_factor", settings.get("partial_rotary_factor"))
    _require(path, "partial_rotary_factor", 1.0 if fraction is None else fraction, 1.0)
    _require(path, "attention_bias", settings.get("attention_bias", False), False)
    _require(path, "mlp_bias", settings.get("mlp_bias", False), False)
    _require(path, "quantization_config", settings.get("quantization_config"), None)


def _require(path: Path, key: str, value: Any, expected: Any) -> None:
    if value != expected:
        raise CheckpointError(f"{path}: {key} is {value}, expected {expected}: unsupported architecture")
