"""Reads a checkpoint of a run, or writes a run folder from which any engine can resume."""

import dataclasses
import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from megamtp.checkpoint import store
from megamtp.checkpoint.contents import WEIGHT, Contents, check_contents
from megamtp.checkpoint.folder import atomic_folder
from megamtp.checkpoint.hf_tokenizer import copy_tokenizer, find_tokenizer
from megamtp.checkpoint.safetensors_file import split
from megamtp.checkpoint.shards import Shards, shard_name, slice_key, write_shard
from megamtp.checkpoint.slices import SLICES, file_slices, write_slices
from megamtp.checkpoint.special_ids import read_special_ids, write_special_ids
from megamtp.checkpoint.state import read_state
from megamtp.config import RESOLVED, ModelConfig, read_config
from megamtp.data.tokenizer import BYTES
from megamtp.errors import CheckpointError

CONVERTED = "converted"  # in the manifest, in place of the engine that wrote the checkpoint


def find_checkpoint(source: Path) -> tuple[Path, Path]:
    """Returns (checkpoint, run directory) for a checkpoint, or for a run directory with its newest checkpoint.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    source = _absolute(source)
    if _is_checkpoint(source):
        return source, source.parent.parent
    return store.newest_checkpoint(source), source


def is_run(path: Path) -> bool:
    """Returns whether this is a run's folder, or one of its checkpoints."""
    path = _absolute(path)
    return (path / "checkpoints").is_dir() or _is_checkpoint(path)


def _absolute(path: Path) -> Path:
    """Returns the absolute path without resolving links: checkpoints/ may be a link to a folder with another name."""
    return Path(os.path.abspath(path))


def _is_checkpoint(path: Path) -> bool:
    return path.parent.name == "checkpoints" and bool(store.NAME.fullmatch(path.name))


def read(source: Path) -> Contents:
    """Opens a checkpoint, or the newest checkpoint of a run. Checks every byte.

    Raises:
        InputError: there is no checkpoint, or it is damaged, or the run's configuration is damaged.
    """
    checkpoint, run_directory = find_checkpoint(source)
    manifest = store.verify(checkpoint)
    config = read_config([str(run_directory / RESOLVED)]) if (run_directory / RESOLVED).exists() else None
    tokenizer = config.data.tokenizer if config else find_tokenizer(run_directory)
    state = read_state(manifest.state, checkpoint)
    shards, model = Shards(checkpoint, manifest.files), ModelConfig(**manifest.model)
    contents = Contents(
        model,
        {kind: shards.tensors(kind) for kind in (WEIGHT, *state.optimizer.tensors)},
        step=manifest.step,
        state=state,
        sequence_length=config.train.sequence_length if config else None,
        tokenizer=Path(tokenizer) if tokenizer not in (None, "", BYTES) else None,
        tokens_are_bytes=tokenizer == BYTES,
        special_ids={} if tokenizer else read_special_ids(run_directory, model.vocab_size),
    )
    check_contents(contents, checkpoint)
    return contents


def write(contents: Contents, directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes a new run folder with one checkpoint, from which any engine can resume with any number of ranks.

    Raises:
        CheckpointError: there is no optimizer state, the destination exists or cannot be written, there is not enough
            space, or a tensor is missing, has a wrong shape, or is unknown.
    """
    if dtype != torch.float32:
        raise CheckpointError(f"a run's checkpoint is in fp32, not {dtype}; leave --dtype out")
    if not contents.has_optimizer_state:
        raise CheckpointError(
            "the source has no optimizer state, which a run needs to resume; expected a run's checkpoint, canonical or "
            "universal: convert it with --to canonical, and start from that with run.initial_weights"
        )
    assert contents.step is not None and contents.state is not None
    check_contents(contents, "the checkpoint")
    manifest = store.Manifest(
        contents.step, 1, CONVERTED, "fp32", dataclasses.asdict(contents.model), contents.state.to_json()
    )
    shapes = contents.weights.shapes
    num_kinds = len(contents.kinds)
    num_bytes = num_kinds * sum(map(math.prod, shapes.values())) * 4
    with atomic_folder(directory, num_bytes) as folder:
        checkpoint = store.checkpoint_path(folder, contents.step)
        store.partial_path(checkpoint).mkdir(parents=True)
        files, slices_of_files = {}, {}
        for number, names in enumerate(split(shapes, num_kinds * 4)):
            name = shard_name(number)
            slices = _Slices(contents, names)
            files[name] = write_shard(store.partial_path(checkpoint) / name, slices, shapes)
            slices_of_files[name] = file_slices(slices, shapes)
        files[SLICES] = write_slices(store.partial_path(checkpoint) / SLICES, slices_of_files)
        store.publish(checkpoint, manifest, files)
        copy_tokenizer(contents, folder)
        write_special_ids(folder, contents.special_ids)


class _Slices:
    """A TensorSource over the tensors of some parameters, all kinds, flattened, by the slice keys of a shard."""

    def __init__(self, contents: Contents, names: Iterable[str]):
        self._tensors = {
            slice_key(kind, name, 0): (contents.sources[kind], name) for kind in contents.kinds for name in names
        }
        self.shapes = {key: (math.prod(source.shapes[name]),) for key, (source, name) in self._tensors.items()}

    def read(self, key: str, start: int = 0, end: int | None = None) -> Tensor:
        """See TensorSource.read."""
        source, name = self._tensors[key]
        return source.read(name, start, end).float()
