"""A run's folder, or one of its checkpoints, as what it holds; and what was converted as a run that any engine goes
on with.
"""

import dataclasses
import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from megamtp.checkpoint import store
from megamtp.checkpoint.contents import WEIGHT, Contents, check_contents
from megamtp.checkpoint.folder import published
from megamtp.checkpoint.hf_tokenizer import copied_tokenizer, copy_tokenizer
from megamtp.checkpoint.safetensors_file import split
from megamtp.checkpoint.shards import Shards, shard_name, slice_key, write_shard
from megamtp.checkpoint.slices import SLICES, file_slices, write_slices
from megamtp.checkpoint.special_ids import read_special_ids, write_special_ids
from megamtp.checkpoint.state import read_state
from megamtp.config import RESOLVED, ModelConfig, read_config
from megamtp.data.tokenizer import BYTES
from megamtp.errors import CheckpointError

CONVERTED = "converted"  # stands for the engine that wrote a checkpoint


def find_checkpoint(source: Path) -> tuple[Path, Path]:
    """(checkpoint, its run directory) of either of the two.

    Raises:
        CheckpointError: there is none.
    """
    source = _as_called(source)
    if _is_checkpoint(source):
        return source, source.parent.parent
    return store.newest_checkpoint(source), source


def is_run(path: Path) -> bool:
    """Whether this is a run's folder, or one of its checkpoints."""
    path = _as_called(path)
    return (path / "checkpoints").is_dir() or _is_checkpoint(path)


def _as_called(path: Path) -> Path:
    """Absolute, links and all: checkpoints/ may be a link to a folder of another name."""
    return Path(os.path.abspath(path))


def _is_checkpoint(path: Path) -> bool:
    return path.parent.name == "checkpoints" and bool(store.NAME.fullmatch(path.name))


def read(source: Path) -> Contents:
    """A run's newest checkpoint, or the given one, of which every byte is checked.

    Raises:
        InputError: there is none, it is damaged, or the run's configuration is.
    """
    checkpoint, run_directory = find_checkpoint(source)
    manifest = store.verified(checkpoint)
    config = read_config([str(run_directory / RESOLVED)]) if (run_directory / RESOLVED).exists() else None
    tokenizer = config.data.tokenizer if config else copied_tokenizer(run_directory)
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
    """A new run folder with one checkpoint, from which any engine goes on at any number of ranks.

    Raises:
        CheckpointError: there is no optimizer state, the destination exists or cannot be written, there is no room, or
            a tensor is missing, misshaped or unknown.
    """
    if dtype != torch.float32:
        raise CheckpointError(f"a run's checkpoint is in fp32, not {dtype}; leave --dtype out")
    if not contents.has_optimizer_state:
        raise CheckpointError(
            "the source has no optimizer state, which a run goes on with; expected a run's checkpoint, canonical or "
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
    with published(directory, num_bytes) as folder:
        checkpoint = store.folder_of(folder, contents.step)
        store.partial_of(checkpoint).mkdir(parents=True)
        files, held = {}, {}
        for number, names in enumerate(split(shapes, num_kinds * 4)):
            name = shard_name(number)
            slices = _Slices(contents, names)
            files[name] = write_shard(store.partial_of(checkpoint) / name, slices, shapes)
            held[name] = file_slices(slices, shapes)
        files[SLICES] = write_slices(store.partial_of(checkpoint) / SLICES, held)
        store.publish(checkpoint, manifest, files)
        copy_tokenizer(contents, folder)
        write_special_ids(folder, contents.special_ids)


class _Slices:
    """A TensorSource of all kinds of some parameters, each in one slice, under the names of a shard."""

    def __init__(self, contents: Contents, names: Iterable[str]):
        self._places = {
            slice_key(kind, name, 0): (contents.sources[kind], name) for kind in contents.kinds for name in names
        }
        self.shapes = {key: (math.prod(source.shapes[name]),) for key, (source, name) in self._places.items()}

    def read(self, key: str, start: int = 0, end: int | None = None) -> Tensor:
        """See TensorSource.read."""
        source, name = self._places[key]
        return source.read(name, start, end).float()
