"""The canonical form of a checkpoint: one folder that depends neither on an engine nor on the number of its ranks.

canonical.json                       the model, the step, the run's counters, and the size of every other file
weights-00001-of-00002.safetensors   every parameter in fp32 by MTPModel's name
exp_avg-00001-of-00002.safetensors   Adam's moments likewise; exp_avg_sq, too; both or none
tokenizer.model                      if the run has one
generation_config.json               ids of special tokens, if the source has a tokenizer of another kind
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch

from megamtp import __version__
from megamtp.checkpoint import safetensors_file
from megamtp.checkpoint.contents import WEIGHT, Contents, check_contents, described_model
from megamtp.checkpoint.folder import check_sizes, published, write_json
from megamtp.checkpoint.hf_tokenizer import copied_tokenizer, copy_tokenizer
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
    """Writes the folder, which appears whole.

    Args:
        dtype: fp32, for nothing may be lost.

    Raises:
        CheckpointError: the destination exists or cannot be written, there is no room, or a tensor is missing,
            misshaped or unknown.
    """
    if dtype != torch.float32:
        raise CheckpointError(f"the canonical form is in fp32, not {dtype}; leave --dtype out")
    check_contents(contents, "the checkpoint")
    num_bytes = sum(math.prod(shape) * 4 for source in contents.sources.values() for shape in source.shapes.values())
    with published(directory, num_bytes) as folder:
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
        CheckpointError: it is of another format or version, a file is missing or damaged, or a tensor is missing,
            misshaped or unknown.
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
            f"{directory} holds {', '.join(sources) or 'nothing'}; expected {kinds[0]}, and all of "
            f"{', '.join(kinds[1:])} or none"
        )
    model = described_model(description["model"], directory / DESCRIPTION)
    contents = Contents(
        model,
        sources,
        description.get("step"),
        state,
        description.get("sequence_length"),
        copied_tokenizer(directory),
        description.get("tokens_are_bytes", False),
        read_special_ids(directory, model.vocab_size),
    )
    check_contents(contents, directory)
    return contents


def check_same_model(directory: Path, found: ModelConfig, expected: ModelConfig) -> None:
    """Raises: CheckpointError if they differ, naming the first key; both written out."""
    for key, value in dataclasses.asdict(found).items():
        wanted = getattr(expected, key)
        if value != wanted:
            raise CheckpointError(
                f"{directory} is of a model with model.{key}={value}, not {wanted}; set model.{key}={value}"
            )


def _stem(kind: str) -> str:
    """How the names of a kind's files begin."""
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
        found = description["format"], description["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}); convert the checkpoint again") from None
    if found[0] != FORMAT or not isinstance(found[1], int):
        raise CheckpointError(f"{path} is of format {found[0]} {found[1]}, expected {FORMAT} {VERSION}")
    if found[1] > VERSION:
        raise CheckpointError(
            f"{path} is of version {found[1]}, written by megamtp {description.get('code_version')}; expected at most "
            f"{VERSION}: use a newer megamtp"
        )
    for key, kind in NEEDED.items():
        if not isinstance(description.get(key), kind):
            raise CheckpointError(
                f"{path}: {key} is {description.get(key)!r}; expected a mapping: convert the checkpoint again"
            )
    return description
