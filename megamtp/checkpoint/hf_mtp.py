"""Exports all heads as a model of transformers whose code (modeling_megamtp.py) lies in the folder, and reads it back.

    write(contents, Path("exported"))    # AutoModelForCausalLM.from_pretrained("exported", trust_remote_code=True)
    contents = read(Path("exported"))

Trunk and head 1, and the heads that run before head 1, have the names of a Llama: see hf.py. A head 1 that is a matrix
is `first_head`. Any other head i is `extra_heads.{i - 2}`, with a Llama's names in its transformer layer. If it has an
unembedding of its own, that is `extra_unembeddings.{i - 2}`.
"""

from pathlib import Path

import torch

from megamtp.checkpoint import hf
from megamtp.checkpoint.contents import (
    Contents,
    check_contents,
    check_tensors,
    parameter_shapes,
    rename_tensors,
    require_head_kinds,
)
from megamtp.checkpoint.folder import atomic_folder
from megamtp.checkpoint.hf_settings import CONFIG, make_contents, model_config, read_settings, write_settings
from megamtp.checkpoint.hf_weights import num_bytes, open_weights, write_weights
from megamtp.config import ModelConfig
from megamtp.errors import CheckpointError

MODEL_FILE = "modeling_megamtp.py"
CODE_FILES = (MODEL_FILE, "layers_megamtp.py")
MODEL_TYPE = "megamtp"
ARCHITECTURE = {
    "architectures": ["MegamtpForCausalLM"],
    "model_type": MODEL_TYPE,
    "auto_map": {
        "AutoConfig": "modeling_megamtp.MegamtpConfig",
        "AutoModelForCausalLM": "modeling_megamtp.MegamtpForCausalLM",
    },
}

UNEMBEDDING_NAMES = {"norm": "norm.weight", "weight": "lm_head.weight"}
# Fields of ModelConfig in config.json besides those of a Llama; older exports have only the first.
HEAD_SETTINGS = (
    "num_future_tokens",
    "head_kind",
    "first_head",
    "chain_form",
    "chain_weights",
    "unembedding",
    "match_parameters",
    "num_layers",
)


def write(contents: Contents, directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes the folder atomically, and replaces an earlier export.

    Raises:
        CheckpointError: see hf.export.
    """
    require_head_kinds(contents, "hf-mtp", hf.KINDS, may_be_replicated=True)
    check_contents(contents, "the checkpoint")
    weights = rename_tensors(contents.weights, {theirs: ours for ours, theirs in _names(contents.model).items()})
    with atomic_folder(directory, num_bytes(weights, dtype), replaceable=True) as folder:
        for file in CODE_FILES:
            (folder / file).write_bytes(Path(__file__).with_name(file).read_bytes())
        head_settings = {key: getattr(contents.model, key) for key in HEAD_SETTINGS}
        write_settings(folder, contents, dtype, ARCHITECTURE | head_settings)
        write_weights(folder, weights, dtype)


def read(directory: Path) -> Contents:
    """Opens the folder.

    Raises:
        CheckpointError: a file is missing or unreadable, or a tensor is missing, has a wrong shape, or is unknown.
    """
    settings = read_settings(directory)
    if not isinstance(settings.get("num_future_tokens"), int):
        raise CheckpointError(
            f"{directory / CONFIG} has no num_future_tokens; expected the number of heads: export it again"
        )
    if (kind := settings.get("head_kind", "parallel")) not in hf.KINDS:
        raise CheckpointError(
            f"{directory / CONFIG}: head_kind is {kind!r}; expected {' or '.join(hf.KINDS)}: correct it"
        )
    head_settings = {key: settings[key] for key in HEAD_SETTINGS[1:] if key in settings}
    model = model_config(settings, directory, settings["num_future_tokens"], MODEL_TYPE, head_settings)
    names, expected = _names(model), parameter_shapes(model)
    weights = open_weights(directory)
    check_tensors(weights.shapes, {theirs: expected[ours] for ours, theirs in names.items()}, directory)
    return make_contents(directory, settings, model, rename_tensors(weights, names))


def _names(model: ModelConfig) -> dict[str, str]:
    """Returns {MTPModel's name: the exported model's name}."""
    names = hf.names_of(model)
    for name in [name for name in parameter_shapes(model) if name not in names]:
        group, head, ours = name.split(".", maxsplit=2)
        if group == "unembeddings":
            names[name] = f"extra_unembeddings.{int(head) - 1}.{UNEMBEDDING_NAMES[ours]}"
            continue
        layer, ours = ("layer.", ours.removeprefix("layer.")) if ours.startswith("layer.") else ("", ours)
        module = "first_head" if head == "0" else f"extra_heads.{int(head) - 1}"
        names[name] = f"{module}.{layer}{hf.LAYER_NAMES.get(ours, ours)}"
    return names
