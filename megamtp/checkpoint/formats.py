"""The formats of a checkpoint: how each is recognised, read and written. The table is at the end."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megamtp.checkpoint import canonical, hf, hf_mtp, hf_settings, megatron, meta, runs, universal
from megamtp.checkpoint.contents import Contents, written_out
from megamtp.config import ModelConfig
from megamtp.errors import CheckpointError

Write = Callable[[Contents, Path, torch.dtype], None]


@dataclass(frozen=True)
class Options:
    """What a source may not say itself.

    Attributes:
        num_future_tokens: heads to make of a model that has but one; None leaves it one.
        model: what the checkpoint is of; some say nothing of their model.
    """

    num_future_tokens: int | None = None
    model: ModelConfig | None = None

    @property
    def num_heads(self) -> int:
        return self.num_future_tokens or 1


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        meaning: in words, for --help.
        mark: whether a path is of this format, as far as the name of a file in it tells.
        read: opens it, as Options say.
        write: None if it is only read.
    """

    meaning: str
    mark: Callable[[Path], bool]
    read: Callable[[Path, Options], Contents]
    write: Write | None = None


def has(file: str) -> Callable[[Path], bool]:
    return lambda path: (path / file).exists()


def detect(source: Path) -> str:
    """The name of the source's format.

    Raises:
        CheckpointError: it is of none, or cannot be looked at.
    """
    try:
        source.stat()
        for name, candidate in FORMATS.items():
            if candidate.mark(source):
                return name
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise CheckpointError(
            f"{source} {reason}; expected a checkpoint of one of these: {', '.join(readable())}"
        ) from None
    raise CheckpointError(
        f"{source} is no checkpoint of a known format; expected one of these: {', '.join(readable())}"
    )


def read(source: Path, options: Options | None = None) -> Contents:
    """A checkpoint of any format.

    Raises:
        CheckpointError: it cannot be read, or is of another model than Options say.
    """
    options = options or Options()
    contents = FORMATS[detect(source)].read(source, options)
    found, asked = contents.model.num_future_tokens, options.num_future_tokens
    if asked not in (None, found):
        raise CheckpointError(f"{source} has {found} heads, --num-future-tokens says {asked}; leave it out")
    if options.model:
        canonical.check_same_model(source, contents.model, written_out(options.model))
    return contents


def readable() -> list[str]:
    return list(FORMATS)


def writable() -> list[str]:
    return [name for name, candidate in FORMATS.items() if candidate.write]


FORMATS = {
    "run": Format(
        "a run's folder (its newest checkpoint), or one of its checkpoints, for any engine at any number of ranks",
        runs.is_run,
        lambda path, _: runs.read(path),
        runs.write,
    ),
    "canonical": Format(
        "every parameter, and Adam's moments if the source has them, for any engine",
        has(canonical.DESCRIPTION),
        lambda path, _: canonical.read(path),
        canonical.write,
    ),
    "hf": Format(
        "trunk and head 1 as LlamaForCausalLM of transformers",
        lambda path: has(hf_settings.CONFIG)(path) and not has(hf_mtp.MODEL_FILE)(path),
        lambda path, options: hf.read(path, options.num_heads),
        hf.export,
    ),
    "hf-mtp": Format(
        "all heads as a model of transformers with its own code (trust_remote_code)",
        has(hf_mtp.MODEL_FILE),
        lambda path, _: hf_mtp.read(path),
        hf_mtp.write,
    ),
    "meta": Format(
        "the form of the paper's released models: params.json and consolidated.pth",
        has(meta.PARAMS),
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
        "Megatron-LM's, of a Llama without model parallelism",
        megatron.is_megatron,
        lambda path, options: megatron.read(path, options.num_heads),
    ),
}
