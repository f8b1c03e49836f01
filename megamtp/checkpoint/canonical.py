"""The canonical format: a folder that does not depend on the engine or the number of ranks.

canonical.json                       the model, the step, the state of the run, and the size of every other file
weights-00001-of-00002.safetensors   all parameters in fp32, by MTPModel's names
exp_avg-00001-of-00002.safetensors   the optimizer's tensors in the same form (also exp_avg_sq); all or none
tokenizer.model                      a SentencePiece model, if the source has one
generation_config.json               ids of special tokens, if the source has another kind of tokenizer
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch

from megamtp import __version__
from megamtp.checkpoint import safetensors_file
from megamtp.checkpoint.contents import WEIGHT, Contents, check_contents, model_from_fields
from megamtp.checkpoint.folder import atomic_folder, check_sizes, write_json
from megamtp.checkpoint.hf_tokenizer import copy_tokenizer, find_tokenizer
from megamtp.checkpoint.safetensors_file import SafetensorsFiles
from megamtp.checkpoint.special_ids import read_special_ids, write_special_ids
from megamtp.checkpoint.state import read_state
from megamtp.checkpoint.tensors import TensorSource
from megamtp.config import ModelConfig
from megamtp.errors import CheckpointError

DESCRIPTION = "canonical.json"
FORMAT, VERSION = "megamtp-canonical", 1
NEEDED = {"model": dict, "file_bytes": dict}


def write(contents: Contents, directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes the folder atomically.

    Args:
        dtype: must be fp32, because the format is lossless.

    Raises:
        CheckpointError: the destination exists or cannot be written, there is not enough space, or a tensor is missing,
            has a wrong shape, or is unknown.
    """
    if dtype != torch.float32:
        raise CheckpointError(f"the canonical format is in fp32, not {dtype}; leave --dtype out")
    check_contents(contents, "the checkpoint")
    num_bytes = sum(math.prod(shape) * 4 for source in contents.sources.values() for shape in source.shapes.values())
    with atomic_folder(directory, num_bytes) as folder:
        for kind, source in contents.sources.items():
            files = safetensors_file.split(source.shapes, 4)
            for number, names in enumerate(files, start=1):
                name = f"{_stem(kind)}-{number:05d}-of-{len(files):05d}.safetensors"
                safetensors_file.write(folder / name, source, names, torch.float32)
        copy_tokenizer(contents, folder)
        write_special_ids(folder, contents.special_ids)
        write_json(folder / DESCRIPTION, _describe(contents, folder))


def read(directory: Path) -> Contents:
    """Opens the folder.

    Raises:
        CheckpointError: the format or the version is unknown, a file is missing or damaged, or a tensor is missing, has
            a wrong shape, or is unknown.
    """
    description = _read_description(directory)
    try:
        check_sizes(directory, description["file_bytes"], remedy="copy it again")
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error.strerror}; copy it again") from None
    saved = description.get("state")
    state = read_state(saved, directory / DESCRIPTION) if saved else None
    sources: dict[str, TensorSource] = {}
    kinds = (WEIGHT, *(state.optimizer.tensors if state else ()))
    for kind in kinds:
        files = sorted(name for name in description["file_bytes"] if name.startswith(f"{_stem(kind)}-"))
        if files:
            sources[kind] = SafetensorsFiles(directory / name for name in files)
    if set(sources) not in ({WEIGHT}, set(kinds)):
        raise CheckpointError(
            f"{directory} holds {', '.join(sources) or 'no tensors'}; expected {kinds[0]}, and all or none of "
            f"{', '.join(kinds[1:])}: copy it again"
        )
    model = model_from_fields(description["model"], directory / DESCRIPTION)
    contents = Contents(
        model,
        sources,
        description.get("step"),
        state,
        description.get("sequence_length"),
        find_tokenizer(directory),
        description.get("tokens_are_bytes", False),
        read_special_ids(directory, model.vocab_size),
    )
    check_contents(contents, directory)
    return contents


def check_same_model(directory: Path, model: ModelConfig, expected: ModelConfig) -> None:
    """Raises CheckpointError if the models differ. Both must have resolved defaults."""
    for key, value in dataclasses.asdict(model).items():
        if value != getattr(expected, key):
            raise CheckpointError(
                f"{directory} is of a model with model.{key}={value}, expected {getattr(expected, key)}; "
                f"set model.{key}={value}"
            )


def _stem(kind: str) -> str:
    """Returns the beginning of the file names of a kind."""
    return "weights" if kind == WEIGHT else kind


def _describe(contents: Contents, folder: Path) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "code_version": __version__,
        "step": contents.step,
        "state": contents.state.to_json() if contents.state else None,
        "sequence_length": contents.sequence_length,
        "tokens_are_bytes": contents.tokens_are_bytes,
        "model": dataclasses.asdict(contents.model),
        "file_bytes": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }


def _read_description(directory: Path) -> dict[str, Any]:
    path = directory / DESCRIPTION
    try:
        description = json.loads(path.read_text())
        format_name, version = description["format"], description["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}); convert the checkpoint again") from None
    if format_name != FORMAT or not isinstance(version, int):
        raise CheckpointError(f"{path} is of format {format_name} {version}, expected {FORMAT} {VERSION}")
    if version > VERSION:
        raise CheckpointError(
            f"{path} is of version {version}, written by megamtp {description.get('code_version')}; expected at most "
            f"{VERSION}: use a newer megamtp"
        )
    for key, kind in NEEDED.items():
        if not isinstance(description.get(key), kind):
            raise CheckpointError(
                f"{path}: {key} is {description.get(key)!r}; expected a mapping: convert the checkpoint again"
            )
    return description
