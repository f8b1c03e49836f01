"""The format of the paper's released models, params.json and consolidated.pth, which is also that of Llama's releases.

`layers` are the trunk and head 1; `extra_heads` are heads 2 to n. A file without `extra_heads` is therefore a Llama.
`n_layers` counts the layers of the trunk and all heads. Names are those of Meta's Llama code.

Source: the released models of Gloeckle et al. 2024, arXiv:2404.19737.
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch

from megamtp.checkpoint import torch_file
from megamtp.checkpoint.contents import (
    WEIGHT,
    Contents,
    Rearranged,
    Rows,
    check_contents,
    check_model,
    check_tensors,
    parameter_shapes,
    positive_integer,
    require_head_kinds,
)
from megamtp.checkpoint.folder import atomic_folder, write_json
from megamtp.checkpoint.hf_tokenizer import TOKENIZER, copy_tokenizer, fits_vocabulary
from megamtp.checkpoint.special_ids import read_special_ids, write_special_ids
from megamtp.checkpoint.tensors import InMemory
from megamtp.checkpoint.torch_file import StreamedTensor
from megamtp.config import ModelConfig
from megamtp.errors import CheckpointError

PARAMS, WEIGHTS = "params.json", "consolidated.pth"
# Llama's releases have one file per GPU of their model parallelism.
FIRST_FILE, SECOND_FILE = "consolidated.00.pth", "consolidated.01.pth"
MULTIPLE_OF = 256  # in the released models
DEFAULT_ROPE_THETA = 10000.0
DERIVED = "rope.freqs"  # in older files; ignored, because it follows from the settings

# {MTPModel's name: Meta's name}
OUTER_NAMES = {
    "embedding.weight": "tok_embeddings.weight",
    "unembedding.norm": "norm.weight",
    "unembedding.weight": "output.weight",
}
LAYER_NAMES = {
    "attention_norm.weight": "attention_norm.weight",
    "attention.query.weight": "attention.wq.weight",
    "attention.key.weight": "attention.wk.weight",
    "attention.value.weight": "attention.wv.weight",
    "attention.output.weight": "attention.wo.weight",
    "mlp_norm.weight": "ffn_norm.weight",
    "mlp.gate.weight": "feed_forward.w1.weight",
    "mlp.up.weight": "feed_forward.w3.weight",
    "mlp.down.weight": "feed_forward.w2.weight",
}
ROTATED = ("attention.query.weight", "attention.key.weight")


def write(contents: Contents, directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes the folder atomically, with the tokenizer if there is one.

    Args:
        dtype: of the weights; the released models are in fp16.

    Raises:
        CheckpointError: the destination exists or cannot be written, there is not enough space, or a tensor is missing,
            has a wrong shape, or is unknown.
    """
    require_head_kinds(contents, "meta")
    check_contents(contents, "the checkpoint")
    model = contents.model
    names = _names(model, range(model.num_future_tokens))
    rows = _rows(model, interleave=True)
    selections = {theirs: Rows(ours, rows.get(_name_in_layer(ours))) for ours, theirs in names.items()}
    weights = Rearranged(contents.weights, selections)
    num_bytes = sum(map(math.prod, weights.shapes.values())) * dtype.itemsize
    with atomic_folder(directory, num_bytes) as folder:
        write_json(folder / PARAMS, _params(model))
        copy_tokenizer(contents, folder)
        write_special_ids(folder, contents.special_ids)
        torch_file.write(folder / WEIGHTS, {name: StreamedTensor(weights, name, dtype) for name in weights.shapes})


def read(directory: Path, num_future_tokens: int = 1) -> Contents:
    """Opens the folder.

    Args:
        num_future_tokens: number of heads to create from a Llama, whose last layer is copied, as in hf.read. Ignored
            for files with `extra_heads`.

    Raises:
        CheckpointError: a file is missing or unreadable, the architecture is not supported, or a tensor is missing, has
            a wrong shape, or is unknown.
    """
    params = _read_params(directory)
    file = _weights_file(directory)
    tensors = dict(torch_file.require_tensors(file, torch_file.read(file)))
    tensors.pop(DERIVED, None)
    saved_heads = params.get("n_future_tokens", 1)
    heads = [0] * num_future_tokens if saved_heads == 1 else range(saved_heads)
    model = _model(directory, params, tensors, len(heads), num_copies=len(heads) - saved_heads)
    names, shapes, rows = _names(model, heads), parameter_shapes(model), _rows(model, interleave=False)
    check_tensors(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {theirs: shapes[ours] for ours, theirs in names.items()},
        directory,
    )
    selections = {ours: Rows(theirs, rows.get(_name_in_layer(ours))) for ours, theirs in names.items()}
    weights = Rearranged(InMemory(tensors), selections)
    tokenizer, notes = _tokenizer(directory, model.vocab_size)
    special_ids = {} if tokenizer else read_special_ids(directory, model.vocab_size)
    return Contents(model, {WEIGHT: weights}, tokenizer=tokenizer, special_ids=special_ids, notes=notes)


def _tokenizer(directory: Path, vocab_size: int) -> tuple[Path | None, tuple[str, ...]]:
    """Returns (the SentencePiece model, notes). Llama's releases keep one model for all sizes in the parent folder."""
    directory = Path(os.path.abspath(directory))
    candidates = [path for path in (directory / TOKENIZER, directory.parent / TOKENIZER) if path.is_file()]
    for path in candidates:
        if fits_vocabulary(path, vocab_size):
            return path, ()
    notes = (
        f"{path} is not a SentencePiece model of at most {vocab_size} pieces: it is not copied" for path in candidates
    )
    return None, tuple(notes)


def _names(model: ModelConfig, heads: Iterable[int]) -> dict[str, str]:
    """Returns {MTPModel's name: Meta's name}. `heads`: for each head of MTPModel, the number of Meta's head, from 0."""
    layers = {f"trunk.{index}": f"layers.{index}" for index in range(model.num_trunk_layers)}
    for ours, theirs in enumerate(heads):
        layers[f"heads.{ours}"] = f"extra_heads.{theirs - 1}" if theirs else f"layers.{model.num_trunk_layers}"
    return OUTER_NAMES | {
        f"{our_layer}.{ours}": f"{their_layer}.{theirs}"
        for our_layer, their_layer in layers.items()
        for ours, theirs in LAYER_NAMES.items()
    }


def _name_in_layer(name: str) -> str:
    """Returns a parameter's name without the prefix of its layer."""
    return name.split(".", maxsplit=2)[-1]


def _rows(model: ModelConfig, interleave: bool) -> dict[str, torch.Tensor]:
    """Returns the row order of query and key matrices, by name in the layer.

    Meta's rotary embedding rotates the pairs (2k, 2k + 1) of an attention head; MTPModel's rotates (k, k + K/2).

    Args:
        interleave: True converts from MTPModel's order to Meta's; False converts back.
    """
    pairs = (2, model.head_dim // 2) if interleave else (model.head_dim // 2, 2)
    order = torch.arange(model.head_dim).view(pairs).T.flatten()
    rows = {}
    for name, num_heads in zip(ROTATED, (model.num_attention_heads, model.key_value_heads), strict=True):
        rows[name] = (model.head_dim * torch.arange(num_heads)[:, None] + order).flatten()
    return rows


def _params(model: ModelConfig) -> dict[str, Any]:
    params = {
        "dim": model.dim,
        "n_layers": model.num_layers_and_heads,
        "n_heads": model.num_attention_heads,
        "n_kv_heads": model.key_value_heads,
        "vocab_size": model.vocab_size,
        "multiple_of": MULTIPLE_OF,
        "norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "n_future_tokens": model.num_future_tokens,
    }
    default_dim = 8 * model.dim // 3
    if _hidden_dim(params) != model.hidden_dim and model.hidden_dim >= default_dim:
        params["multiple_of"] = model.hidden_dim
    elif _hidden_dim(params) != model.hidden_dim:
        params |= {"multiple_of": 1, "ffn_dim_multiplier": (model.hidden_dim + 0.5) / default_dim}
    return params


def _hidden_dim(params: dict[str, Any]) -> int:
    """Returns the SwiGLU dimension by Meta's rule: 8/3 of `dim`, times a factor if there is one, rounded up."""
    hidden = 8 * params["dim"] // 3
    if params.get("ffn_dim_multiplier") is not None:
        hidden = int(params["ffn_dim_multiplier"] * hidden)
    return -(-hidden // params["multiple_of"]) * params["multiple_of"]


def _model(
    directory: Path, params: dict[str, Any], tensors: dict[str, torch.Tensor], num_heads: int, num_copies: int
) -> ModelConfig:
    """Returns the model with `num_heads` heads, of which `num_copies` are not in the file."""
    path, embedding = directory / PARAMS, tensors.get(OUTER_NAMES["embedding.weight"])
    if params.get("vocab_size") == -1 and embedding is not None:  # -1 means the tokenizer's size
        params = params | {"vocab_size": len(embedding)}
    dim, num_layers, num_attention_heads, vocab_size = (
        positive_integer(params, key, path) for key in ("dim", "n_layers", "n_heads", "vocab_size")
    )
    model = ModelConfig(
        dim=dim,
        num_layers=num_layers + num_copies,
        num_future_tokens=num_heads,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=params.get("n_kv_heads"),
        mlp_dim=_hidden_dim(params),
        vocab_size=vocab_size,
        rope_theta=params.get("rope_theta", DEFAULT_ROPE_THETA),
        norm_eps=cast("float", params.get("norm_eps")),
    )
    if num_layers <= num_heads - num_copies:
        raise CheckpointError(f"{path}: n_layers is {num_layers}; expected more than n_future_tokens")
    return check_model(model, path)


def _read_params(directory: Path) -> dict[str, Any]:
    path = directory / PARAMS
    try:
        params = json.loads(path.read_text())
        if not isinstance(params, dict):
            raise ValueError("not a mapping")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again") from None
    for key in ("multiple_of", "n_future_tokens"):
        positive_integer({"n_future_tokens": 1} | params, key, path)
    factor = params.get("ffn_dim_multiplier")
    if factor is not None and not (isinstance(factor, float | int) and 0 < factor < math.inf):
        raise CheckpointError(
            f"{path}: ffn_dim_multiplier is {factor!r}; expected a number above 0, or null: correct it"
        )
    if params.get("use_scaled_rope"):
        raise CheckpointError(f"{path}: use_scaled_rope is true, expected false: unsupported architecture")
    return params


def _weights_file(directory: Path) -> Path:
    if (directory / SECOND_FILE).exists():
        raise CheckpointError(
            f"{directory} has {SECOND_FILE}: weights for several GPUs; expected only {WEIGHTS}: merge them"
        )
    return directory / (FIRST_FILE if (directory / FIRST_FILE).exists() else WEIGHTS)
