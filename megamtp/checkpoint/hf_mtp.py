"""All heads as a folder of transformers with a model of its own (modeling_megamtp.py, which lies in the folder), and
back.

write(contents, Path("exported"))      # AutoModelForCausalLM.from_pretrained("exported", trust_remote_code=True)
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
    renamed,
    require_parallel_heads,
)
from megamtp.checkpoint.folder import published
from megamtp.checkpoint.hf_settings import CONFIG, contents_of, model_config, read_settings, write_settings
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
    """Writes the folder, which appears whole; an earlier export is replaced.

    Raises:
        CheckpointError: as hf.export.
    """
    require_parallel_heads(contents, "hf-mtp")
    check_contents(contents, "the checkpoint")
    weights = renamed(contents.weights, {theirs: ours for ours, theirs in _names(contents.model).items()})
    with published(directory, num_bytes(weights, dtype), replaceable=True) as folder:
        (folder / MODEL_FILE).write_bytes(Path(__file__).with_name(MODEL_FILE).read_bytes())
        write_settings(folder, contents, dtype, ARCHITECTURE | {"num_future_tokens": contents.model.num_future_tokens})
        write_weights(folder, weights, dtype)


def read(directory: Path) -> Contents:
    """Opens the folder.

    Raises:
        CheckpointError: a file is missing or unreadable, or a tensor is missing, misshaped or unknown.
    """
    settings = read_settings(directory)
    if not isinstance(settings.get("num_future_tokens"), int):
        raise CheckpointError(
            f"{directory / CONFIG} has no num_future_tokens; expected the number of heads: export it again"
        )
    model = model_config(settings, directory, settings["num_future_tokens"], MODEL_TYPE)
    names, shapes = _names(model), parameter_shapes(model)
    found = open_weights(directory)
    check_tensors(found.shapes, {theirs: shapes[ours] for ours, theirs in names.items()}, directory)
    return contents_of(directory, settings, model, renamed(found, names))


def _names(model: ModelConfig) -> dict[str, str]:
    """MTPModel's name -> the exported model's."""
    return hf.names_of(model) | {
        f"heads.{head}.{ours}": f"extra_heads.{head - 1}.{theirs}"
        for head in range(1, model.num_future_tokens)
        for ours, theirs in hf.LAYER_NAMES.items()
    }
