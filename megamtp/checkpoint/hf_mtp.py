"""Exports all heads as a model of transformers whose code (modeling_megamtp.py) lies in the folder, and reads it back.

write(contents, Path("exported"))    # AutoModelForCausalLM.from_pretrained("exported", trust_remote_code=True)
contents = read(Path("exported"))
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
MODEL_TYPE = "megamtp"
ARCHITECTURE = {
    "architectures": ["MegamtpForCausalLM"],
    "model_type": MODEL_TYPE,
    "auto_map": {
        "AutoConfig": "modeling_megamtp.MegamtpConfig",
        "AutoModelForCausalLM": "modeling_megamtp.MegamtpForCausalLM",
    },
}


def write(contents: Contents, directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes the folder atomically, and replaces an earlier export.

    Raises:
        CheckpointError: see hf.export.
    """
    require_head_kinds(contents, "hf-mtp")
    check_contents(contents, "the checkpoint")
    weights = rename_tensors(contents.weights, {theirs: ours for ours, theirs in _names(contents.model).items()})
    with atomic_folder(directory, num_bytes(weights, dtype), replaceable=True) as folder:
        (folder / MODEL_FILE).write_bytes(Path(__file__).with_name(MODEL_FILE).read_bytes())
        write_settings(folder, contents, dtype, ARCHITECTURE | {"num_future_tokens": contents.model.num_future_tokens})
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
    model = model_config(settings, directory, settings["num_future_tokens"], MODEL_TYPE)
    names, expected = _names(model), parameter_shapes(model)
    weights = open_weights(directory)
    check_tensors(weights.shapes, {theirs: expected[ours] for ours, theirs in names.items()}, directory)
    return make_contents(directory, settings, model, rename_tensors(weights, names))


def _names(model: ModelConfig) -> dict[str, str]:
    """Returns {MTPModel's name: the exported model's name}."""
    return hf.names_of(model) | {
        f"heads.{head}.{ours}": f"extra_heads.{head - 1}.{theirs}"
        for head in range(1, model.num_future_tokens)
        for ours, theirs in hf.LAYER_NAMES.items()
    }
