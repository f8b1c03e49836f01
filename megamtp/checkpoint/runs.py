"""A run's folder, or one of its checkpoints, as what it holds."""

from pathlib import Path

from megamtp.checkpoint import store
from megamtp.checkpoint.contents import WEIGHT, Contents
from megamtp.checkpoint.tensors import InMemory
from megamtp.config import RESOLVED, read_config


def find_checkpoint(source: Path) -> tuple[Path, Path]:
    """(checkpoint, its run directory) of either of the two.

    Raises:
        CheckpointError: there is none.
    """
    source = source.resolve()
    if source.parent.name == "checkpoints" and store.NAME.fullmatch(source.name):
        return source, source.parent.parent
    return store.newest_checkpoint(source), source


def read(source: Path) -> Contents:
    """The weights of a run's newest checkpoint, or of the given one.

    Raises:
        InputError: there is none, it is damaged, or the run's configuration is.
    """
    checkpoint, run_directory = find_checkpoint(source)
    config = read_config([str(run_directory / RESOLVED)])
    model, weights = store.load_weights(checkpoint)
    return Contents(
        model,
        {WEIGHT: InMemory(weights)},
        step=int(checkpoint.name.removeprefix("step-")),
        sequence_length=config.train.sequence_length,
        tokenizer=Path(config.data.tokenizer) if config.data.tokenizer else None,
    )
