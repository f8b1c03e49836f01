"""Exports a Llama of transformers: the trunk and head 1. Starts multi-token models from such folders.

    export(contents, Path("exported"))
    contents = read(Path("exported"))                      # the ordinary next-token model
    contents = read(Path("llama"), num_future_tokens=4)    # the last layer becomes head 1; heads 2 to 4 are copies

Head 1 becomes the last layer of the Llama. Heads 2 to n are not exported, because LlamaForCausalLM has no place for
them (hf_mtp.py exports all heads); but anticausal heads n to 2 are layers before head 1. Of replicated unembeddings,
that of head 1 is exported. Versions 4 and 5 of transformers load the result.
"""

from pathlib import Path

import torch

from megamtp.checkpoint.contents import (
    Contents,
    check_contents,
    check_tensors,
    parameter_shapes,
    rename_tensors,
    require_head_kinds,
)
from megamtp.checkpoint.folder import atomic_folder
from megamtp.checkpoint.hf_settings import llama_layers, make_contents, model_config, read_settings, write_settings
from megamtp.checkpoint.hf_weights import num_bytes, open_weights, write_weights
from megamtp.config import ModelConfig
from megamtp.errors import CheckpointError

KINDS = ("parallel", "linear", "causal", "anticausal", "chained")  # kinds of heads that transformers' folders can hold
# In older files; ignored, as by transformers, because it follows from the settings.
DERIVED = ".self_attn.rotary_emb.inv_freq"

# {MTPModel's name: LlamaForCausalLM's name}. Both rotate the pairs (k, k + K/2), so rows keep their order.
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
    """Writes the folder atomically, with weights in files of at most 5 GB.

    Args:
        directory: a new or empty folder, or an earlier export, which is replaced.
        dtype: of the weights.

    Raises:
        CheckpointError: trunk and head 1 are not a Llama, the destination holds something else or cannot be written, a
            weight is missing, has a wrong shape, or is unknown, or transformers cannot reproduce the tokenizer.
    """
    require_head_kinds(contents, "hf", KINDS, may_be_replicated=True)
    if contents.model.head_kind == "linear" and contents.model.first_head != "layer":
        raise CheckpointError(
            "hf cannot hold heads of the kind linear with model.first_head=same; expected model.first_head=layer, "
            "because each layer of a Llama is a transformer layer: use hf-mtp"
        )
    check_contents(contents, "the checkpoint")
    weights = rename_tensors(contents.weights, {theirs: ours for ours, theirs in names_of(contents.model).items()})
    with atomic_folder(directory, num_bytes(weights, dtype), replaceable=True) as folder:
        write_settings(folder, contents, dtype, {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
        write_weights(folder, weights, dtype)


def read(directory: Path, num_future_tokens: int = 1) -> Contents:
    """Opens the folder of a LlamaForCausalLM without biases as a model with `num_future_tokens` heads.

    All layers except the last become the trunk. The last layer becomes head 1, which computes the same as the Llama.
    Heads 2 to n are copies of head 1. Unlike new weights, a copy produces outputs that the unembedding already maps to
    plausible tokens.

    Raises:
        CheckpointError: a file is missing or unreadable, the architecture is not supported, or a tensor is missing, has
            a wrong shape, or is unknown.
    """
    settings = read_settings(directory)
    model = model_config(settings, directory, num_future_tokens)
    weights = open_weights(directory)
    names = names_of(model, copies=True)
    notes: tuple[str, ...] = ()
    if settings.get("tie_word_embeddings") and OUTER_NAMES["unembedding.weight"] not in weights.shapes:
        names["unembedding.weight"] = OUTER_NAMES["embedding.weight"]
        notes = (f"{directory} ties its unembedding to its embedding: the result has separate weights for both",)
    expected = parameter_shapes(model)
    shapes = {name: shape for name, shape in weights.shapes.items() if not name.endswith(DERIVED)}
    check_tensors(shapes, {theirs: expected[ours] for ours, theirs in names.items()}, directory)
    return make_contents(directory, settings, model, rename_tensors(weights, names), notes)


def names_of(model: ModelConfig, copies: bool = False) -> dict[str, str]:
    """Returns {MTPModel's name: LlamaForCausalLM's name} of the exported parameters.

    Args:
        copies: include parallel heads 2 to n, with LlamaForCausalLM's names of head 1.
    """
    layers = [(layer, number) for number, layer in enumerate(llama_layers(model))]
    copied = range(1, model.num_future_tokens if copies else 1)
    layers += [(f"heads.{index}", model.num_trunk_layers) for index in copied]
    own = "unembeddings.0." if model.unembedding == "replicated" else "unembedding."
    outer = {ours.replace("unembedding.", own): theirs for ours, theirs in OUTER_NAMES.items()}
    return outer | {
        f"{layer}.{ours}": f"model.layers.{number}.{theirs}"
        for layer, number in layers
        for ours, theirs in LAYER_NAMES.items()
    }
