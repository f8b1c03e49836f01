"""The weights in a folder of transformers, by transformers' names: one file, or several files with an index."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from megamtp.checkpoint import safetensors_file, torch_file
from megamtp.checkpoint.folder import write_json
from megamtp.checkpoint.safetensors_file import SafetensorsFiles
from megamtp.checkpoint.tensors import InMemory, TensorSource
from megamtp.errors import CheckpointError

WEIGHTS, PICKLED = "model.safetensors", "pytorch_model.bin"  # older folders have the second


def num_bytes(weights: TensorSource, dtype: torch.dtype) -> int:
    """Returns the size of all tensors on disk."""
    return sum(map(math.prod, weights.shapes.values())) * dtype.itemsize


def write_weights(folder: Path, weights: TensorSource, dtype: torch.dtype) -> None:
    """Writes all tensors, in files of at most 5 GB with the names that transformers uses."""
    files = safetensors_file.split(weights.shapes, dtype.itemsize)
    stem, suffix = WEIGHTS.split(".")
    names = [f"{stem}-{number:05d}-of-{len(files):05d}.{suffix}" for number in range(1, len(files) + 1)]
    names = names if len(files) > 1 else [WEIGHTS]
    for name, tensors in zip(names, files, strict=True):
        safetensors_file.write(folder / name, weights, tensors, dtype)
    if len(files) > 1:
        weight_map = {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
        write_json(
            _index(folder / WEIGHTS), {"metadata": {"total_size": num_bytes(weights, dtype)}, "weight_map": weight_map}
        )


def open_weights(directory: Path) -> TensorSource:
    """Opens all tensors of the folder, from the files that transformers would read.

    Raises:
        CheckpointError: there are no weights, a file is missing or damaged, or a file lacks a tensor that the index
            lists.
    """
    for name, open_files in ((WEIGHTS, SafetensorsFiles), (PICKLED, _pickled)):
        if (directory / name).exists():
            return open_files([directory / name])
        if _index(directory / name).exists():
            weight_map = _read_index(_index(directory / name))
            weights = open_files(directory / file for file in sorted(set(weight_map.values())))
            for tensor, file in weight_map.items():
                if tensor not in weights.shapes:
                    raise CheckpointError(
                        f"{directory / file} has no tensor {tensor}; expected it there, as in {name}.index.json: copy "
                        "it again"
                    )
            return weights
    raise CheckpointError(f"{directory} has no {WEIGHTS}; expected it, its index, or {PICKLED}: copy the weights, too")


def _index(weights: Path) -> Path:
    return weights.with_name(f"{weights.name}.index.json")


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        if not all(isinstance(file, str) for file in weight_map.values()):
            raise TypeError("weight_map has values that are not file names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read ({error}); copy it again") from None
    return weight_map


def _pickled(files: Iterable[Path]) -> InMemory:
    weights: dict[str, Tensor] = {}
    for file in files:
        tensors = torch_file.require_tensors(file, torch_file.read(file))
        for name in tensors.keys() & weights.keys():
            raise CheckpointError(f"{file} and another file both have tensor {name}; expected it once")
        weights |= tensors
    return InMemory(weights)
