"""Checkpoint formats: how each one is detected, read and written. The table FORMATS is at the end."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megamtp.checkpoint import canonical, hf, hf_mtp, hf_settings, megatron, meta, runs, universal
from megamtp.checkpoint.contents import Contents, resolve_defaults
from megamtp.config import ModelConfig
from megamtp.errors import CheckpointError

Write = Callable[[Contents, Path, torch.dtype], None]


@dataclass(frozen=True)
class Options:
    """Options for reading a checkpoint that lacks this information.

    Attributes:
        num_future_tokens: number of heads to create for a model that has only one; None: leave one head.
        model: the model, for checkpoints that do not describe it.
    """

    num_future_tokens: int | None = None
    model: ModelConfig | None = None

    @property
    def num_heads(self) -> int:
        return self.num_future_tokens or 1


@dataclass(frozen=True)
class Format:
    """A checkpoint format.

    Attributes:
        meaning: a description for --help.
        matches: returns whether a path is of this format, judging by the names of its files.
        read: opens a checkpoint.
        write: writes a checkpoint; None if the format can only be read.
    """

    meaning: str
    matches: Callable[[Path], bool]
    read: Callable[[Path, Options], Contents]
    write: Write | None = None


def contains(file: str) -> Callable[[Path], bool]:
    """Returns a function that checks whether a folder contains this file."""
    return lambda path: (path / file).exists()


def detect(source: Path) -> str:
    """Returns the name of the source's format.

    Raises:
        CheckpointError: the format is unknown, or the source cannot be read.
    """
    try:
        source.stat()
        for name, candidate in FORMATS.items():
            if candidate.matches(source):
                return name
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise CheckpointError(
            f"{source} {reason}; expected a checkpoint in one of these formats: {', '.join(readable_formats())}"
        ) from None
    raise CheckpointError(
        f"{source} is not a checkpoint of a known format; expected one of these: {', '.join(readable_formats())}"
    )


def read(source: Path, options: Options | None = None) -> Contents:
    """Opens a checkpoint of any format.

    Raises:
        CheckpointError: the checkpoint cannot be read, or its model differs from the options.
    """
    options = options or Options()
    contents = FORMATS[detect(source)].read(source, options)
    num_heads, requested = contents.model.num_future_tokens, options.num_future_tokens
    if requested not in (None, num_heads):
        raise CheckpointError(
            f"{source} has {num_heads} heads, expected --num-future-tokens={requested}; leave --num-future-tokens out"
        )
    if options.model:
        canonical.check_same_model(source, contents.model, resolve_defaults(options.model))
    return contents


def readable_formats() -> list[str]:
    return list(FORMATS)


def writable_formats() -> list[str]:
    return [name for name, candidate in FORMATS.items() if candidate.write]


FORMATS = {
    "run": Format(
        "a run's folder (its newest checkpoint), or one of its checkpoints; for any engine and number of ranks",
        runs.is_run,
        lambda path, _: runs.read(path),
        runs.write,
    ),
    "canonical": Format(
        "all parameters, and Adam's moments if the source has them; for any engine",
        contains(canonical.DESCRIPTION),
        lambda path, _: canonical.read(path),
        canonical.write,
    ),
    "hf": Format(
        "trunk and head 1 as a LlamaForCausalLM of transformers; with anticausal heads, all of them",
        lambda path: contains(hf_settings.CONFIG)(path) and not contains(hf_mtp.MODEL_FILE)(path),
        lambda path, options: hf.read(path, options.num_heads),
        hf.export,
    ),
    "hf-mtp": Format(
        "all heads, as a model of transformers with its own code (trust_remote_code)",
        contains(hf_mtp.MODEL_FILE),
        lambda path, _: hf_mtp.read(path),
        hf_mtp.write,
    ),
    "meta": Format(
        "the format of the paper's released models: params.json and consolidated.pth",
        contains(meta.PARAMS),
        lambda path, options: meta.read(path, options.num_heads),
        meta.write,
    ),
    "universal": Format(
        "DeepSpeed's universal checkpoint, with Adam's moments",
        universal.is_universal,
        lambda path, options: universal.read(path, options.model),
        universal.write,
    ),
    "megatron": Format(
        "Megatron-LM's checkpoint of a Llama without model parallelism",
        megatron.is_megatron,
        lambda path, options: megatron.read(path, options.num_heads),
    ),
}
