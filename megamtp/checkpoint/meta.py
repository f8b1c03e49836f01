"""The form in which the paper's models were released: params.json and consolidated.pth, heads 2 to n as `extra_heads`.

Source: arXiv:2404.19737's release; its names are those of Meta's Llama code. `layers` are the trunk and head 1,
whatever n, so a file without `extra_heads` is a Llama of that code; `n_layers` counts trunk and heads together.
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
    check_tensors,
    checked_model,
    parameter_shapes,
    require_parallel_heads,
    whole_number,
)
from megamtp.checkpoint.folder import published, write_json
from megamtp.checkpoint.hf_tokenizer import TOKENIZER, copy_tokenizer, fits
from megamtp.checkpoint.special_ids import read_special_ids, write_special_ids
from megamtp.checkpoint.tensors import InMemory
from megamtp.checkpoint.torch_file import Streamed
from megamtp.config import ModelConfig
from megamtp.errors import CheckpointError

PARAMS, WEIGHTS = "params.json", "consolidated.pth"
ONE_OF_ONE, ONE_OF_MANY = "consolidated.00.pth", "consolidated.01.pth"  # Llama's, in as many parts as GPUs
MULTIPLE_OF = 256  # the released models'
DEFAULT_ROPE_THETA = 10000.0
DERIVED = "rope.freqs"  # of older files: computed from the settings, so left out

# MTPModel's names -> Meta's.
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
    """Writes the folder, which appears whole, with the tokenizer if there is one; `dtype` as asked for (released:
    fp16).

    Raises:
        CheckpointError: the destination exists or cannot be written, there is no room, or a tensor is missing,
            misshaped or unknown.
    """
    require_parallel_heads(contents, "meta")
    check_contents(contents, "the checkpoint")
    model = contents.model
    names = _names(model, range(model.num_future_tokens))
    rows = _rows(model, interleave=True)
    weights = Rearranged(
        contents.weights, {theirs: Rows(ours, rows.get(_kind(ours))) for ours, theirs in names.items()}
    )
    num_bytes = sum(map(math.prod, weights.shapes.values())) * dtype.itemsize
    with published(directory, num_bytes) as folder:
        write_json(folder / PARAMS, _params(model))
        copy_tokenizer(contents, folder)
        write_special_ids(folder, contents.special_ids)
        torch_file.write(folder / WEIGHTS, {name: Streamed(weights, name, dtype) for name in weights.shapes})


def read(directory: Path, num_future_tokens: int = 1) -> Contents:
    """Opens the folder.

    Args:
        num_future_tokens: heads to make of a Llama, which has one: as hf.read. What has `extra_heads` has its own
            number.

    Raises:
        CheckpointError: a file is missing or unreadable, the model is of another form, or a tensor is missing,
            misshaped or unknown.
    """
    params = _read_params(directory)
    file = _weights_file(directory)
    found = dict(torch_file.tensors_of(file, torch_file.read(file)))
    found.pop(DERIVED, None)
    own_heads = params.get("n_future_tokens", 1)
    heads = [0] * num_future_tokens if own_heads == 1 else range(own_heads)
    model = _model(directory, params, found, len(heads), copies=len(heads) - own_heads)
    names, shapes, rows = _names(model, heads), parameter_shapes(model), _rows(model, interleave=False)
    check_tensors(
        {name: tuple(tensor.shape) for name, tensor in found.items()},
        {theirs: shapes[ours] for ours, theirs in names.items()},
        directory,
    )
    weights = Rearranged(InMemory(found), {ours: Rows(theirs, rows.get(_kind(ours))) for ours, theirs in names.items()})
    tokenizer, notes = _tokenizer(directory, model.vocab_size)
    special_ids = {} if tokenizer else read_special_ids(directory, model.vocab_size)
    return Contents(model, {WEIGHT: weights}, tokenizer=tokenizer, special_ids=special_ids, notes=notes)


def _tokenizer(directory: Path, vocab_size: int) -> tuple[Path | None, tuple[str, ...]]:
    """The SentencePiece model: in the folder or beside it, where Llama's releases have one for all sizes. And notes."""
    directory = Path(os.path.abspath(directory))
    found = [path for path in (directory / TOKENIZER, directory.parent / TOKENIZER) if path.is_file()]
    for path in found:
        if fits(path, vocab_size):
            return path, ()
    return None, tuple(f"{path} is no SentencePiece model of {vocab_size} pieces: it stays behind" for path in found)


def _names(model: ModelConfig, heads: Iterable[int]) -> dict[str, str]:
    """MTPModel's name -> Meta's; `heads`: which of Meta's heads, from 0, each of ours is."""
    layers = {f"trunk.{index}": f"layers.{index}" for index in range(model.num_trunk_layers)}
    for ours, theirs in enumerate(heads):
        layers[f"heads.{ours}"] = f"extra_heads.{theirs - 1}" if theirs else f"layers.{model.num_trunk_layers}"
    return OUTER_NAMES | {
        f"{ours}.{ours_inside}": f"{theirs}.{theirs_inside}"
        for ours, theirs in layers.items()
        for ours_inside, theirs_inside in LAYER_NAMES.items()
    }


def _kind(name: str) -> str:
    """A parameter's name within its layer."""
    return name.split(".", maxsplit=2)[-1]


def _rows(model: ModelConfig, interleave: bool) -> dict[str, torch.Tensor]:
    """The order of rows of queries and keys: Meta turns each pair (2k, 2k + 1) of an attention head, we (k, k + K/2).

    Args:
        interleave: from ours to Meta's; else back.
    """
    pairs = (2, model.head_dim // 2) if interleave else (model.head_dim // 2, 2)
    order = torch.arange(model.head_dim).view(pairs).T.flatten()
    found = {}
    for name, num_heads in zip(ROTATED, (model.num_attention_heads, model.key_value_heads), strict=True):
        found[name] = (model.head_dim * torch.arange(num_heads)[:, None] + order).flatten()
    return found


def _params(model: ModelConfig) -> dict[str, Any]:
    params = {
        "dim": model.dim,
        "n_layers": model.num_layers,
        "n_heads": model.num_attention_heads,
        "n_kv_heads": model.key_value_heads,
        "vocab_size": model.vocab_size,
        "multiple_of": MULTIPLE_OF,
        "norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "n_future_tokens": model.num_future_tokens,
    }
    plain = 8 * model.dim // 3
    if _hidden_dim(params) != model.hidden_dim and model.hidden_dim >= plain:
        params["multiple_of"] = model.hidden_dim
    elif _hidden_dim(params) != model.hidden_dim:
        params |= {"multiple_of": 1, "ffn_dim_multiplier": (model.hidden_dim + 0.5) / plain}
    return params


def _hidden_dim(params: dict[str, Any]) -> int:
    """Meta's rule: 8/3 of the width, times a factor if there is one, rounded up to a multiple."""
    hidden = 8 * params["dim"] // 3
    if params.get("ffn_dim_multiplier") is not None:
        hidden = int(params["ffn_dim_multiplier"] * hidden)
    return -(-hidden // params["multiple_of"]) * params["multiple_of"]


def _model(
    directory: Path, params: dict[str, Any], found: dict[str, torch.Tensor], num_heads: int, copies: int
) -> ModelConfig:
    """`copies`: heads that the file does not have."""
    path, embedding = directory / PARAMS, found.get(OUTER_NAMES["embedding.weight"])
    if params.get("vocab_size") == -1 and embedding is not None:
        params = params | {"vocab_size": len(embedding)}  # -1: as many as the tokenizer has
    dim, num_layers, num_attention_heads, vocab_size = (
        whole_number(params, key, path) for key in ("dim", "n_layers", "n_heads", "vocab_size")
    )
    model = ModelConfig(
        dim=dim,
        num_layers=num_layers + copies,
        num_future_tokens=num_heads,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=params.get("n_kv_heads"),
        mlp_dim=_hidden_dim(params),
        vocab_size=vocab_size,
        rope_theta=params.get("rope_theta", DEFAULT_ROPE_THETA),
        norm_eps=cast("float", params.get("norm_eps")),
    )
    if model.num_trunk_layers < 1:
        raise CheckpointError(f"{path}: n_layers is {num_layers}; expected more than n_future_tokens")
    return checked_model(model, path)


def _read_params(directory: Path) -> dict[str, Any]:
    path = directory / PARAMS
    try:
        params = json.loads(path.read_text())
        if not isinstance(params, dict):
            raise ValueError("no mapping")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again") from None
    for key in ("multiple_of", "n_future_tokens"):
        whole_number({"n_future_tokens": 1} | params, key, path)
    factor = params.get("ffn_dim_multiplier")
    if factor is not None and not (isinstance(factor, float | int) and 0 < factor < math.inf):
        raise CheckpointError(f"{path}: ffn_dim_multiplier is {factor!r}; expected a number above 0, or null: mend it")
    if params.get("use_scaled_rope"):
        raise CheckpointError(f"{path}: use_scaled_rope is true, expected false: another form of model")
    return params


def _weights_file(directory: Path) -> Path:
    if (directory / ONE_OF_MANY).exists():
        raise CheckpointError(
            f"{directory} has {ONE_OF_MANY}: weights cut for several GPUs; expected {WEIGHTS} alone: merge them"
        )
    return directory / (ONE_OF_ONE if (directory / ONE_OF_ONE).exists() else WEIGHTS)
