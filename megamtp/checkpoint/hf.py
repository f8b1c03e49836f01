"""Trunk and head 1 as a LlamaForCausalLM folder of transformers, and any such folder as the beginning of a multi-token
model.

    export(contents, Path("exported"))
    contents = read(Path("exported"))                          # the ordinary next-token model
    contents = read(Path("llama"), num_future_tokens=4)        # its last layer is head 1; heads 2 to 4 are copies of it

Head 1 is the last layer; heads 2 to n stay behind, being no part of that architecture. Versions 4 and 5 of transformers
load it.
"""

from pathlib import Path

import torch

from megamtp.checkpoint.contents import (
    Contents,
    check_contents,
    check_tensors,
    parameter_shapes,
    renamed,
    require_parallel_heads,
)
from megamtp.checkpoint.folder import published
from megamtp.checkpoint.hf_settings import contents_of, model_config, read_settings, write_settings
from megamtp.checkpoint.hf_weights import num_bytes, open_weights, write_weights
from megamtp.config import ModelConfig

# in older files; computed from the settings, as transformers does, which leaves it out
DERIVED = ".self_attn.rotary_emb.inv_freq"

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
    require_parallel_heads(contents, "hf")
    check_contents(contents, "the checkpoint")
    weights = renamed(contents.weights, {theirs: ours for ours, theirs in names_of(contents.model).items()})
    with published(directory, num_bytes(weights, dtype), replaceable=True) as folder:
        write_settings(folder, contents, dtype, {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
        write_weights(folder, weights, dtype)


def read(directory: Path, num_future_tokens: int = 1) -> Contents:
    """A LlamaForCausalLM folder without biases, as the beginning of a model of so many heads.

    The trunk is all its layers but the last, which is head 1, and of which heads 2 to n are copies; so head 1 computes
    what the whole model did. Norm and unembedding are its own. A copy, rather than new weights, puts every head where
    the unembedding can read its output already.

    Raises:
        CheckpointError: a file is missing or unreadable, the model is of another form, or a tensor is missing,
            misshaped or unknown (the message names it).
    """
    settings = read_settings(directory)
    model = model_config(settings, directory, num_future_tokens)
    found = open_weights(directory)
    names = names_of(model, copies=True)
    notes: tuple[str, ...] = ()
    if settings.get("tie_word_embeddings") and OUTER_NAMES["unembedding.weight"] not in found.shapes:
        names["unembedding.weight"] = OUTER_NAMES["embedding.weight"]
        notes = (f"{directory} ties its unembedding to its embedding: from here on each has weights of its own",)
    shapes = parameter_shapes(model)
    found_shapes = {name: shape for name, shape in found.shapes.items() if not name.endswith(DERIVED)}
    check_tensors(found_shapes, {theirs: shapes[ours] for ours, theirs in names.items()}, directory)
    return contents_of(directory, settings, model, renamed(found, names), notes)


def names_of(model: ModelConfig, copies: bool = False) -> dict[str, str]:
    """MTPModel's name -> LlamaForCausalLM's, of all that is exported; with `copies`, heads 2 to n have the names of
    head 1.
    """
    layers = [(f"trunk.{index}", index) for index in range(model.num_trunk_layers)]
    heads = range(model.num_future_tokens if copies else 1)
    layers += [(f"heads.{index}", model.num_trunk_layers) for index in heads]
    return OUTER_NAMES | {
        f"{layer}.{ours}": f"model.layers.{number}.{theirs}"
        for layer, number in layers
        for ours, theirs in LAYER_NAMES.items()
    }
