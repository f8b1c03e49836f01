"""What a rank writes into a checkpoint, in DeepSpeed's own layout, and reads from it."""

import pickle
import zipfile
from pathlib import Path

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from megamtp.errors import CheckpointError


def save_state(engine: DeepSpeedEngine, directory: Path, rank: int) -> None:
    """Weights and optimizer, one file per rank and kind of state, into `directory`/engine; random states beside it. Collective."""
    engine.save_checkpoint(str(directory), tag="engine", save_latest=False)
    torch.save(_random_states(), directory / f"random_rank{rank:05d}.pt")


def load_state(engine: DeepSpeedEngine, directory: Path, rank: int) -> None:
    """Restores what save_state wrote, bit for bit. Collective.

    Raises:
        CheckpointError: the files are missing or damaged.
    """
    try:
        path, _ = engine.load_checkpoint(str(directory), tag="engine")
    except (KeyError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{directory} is damaged ({error!r}); remove it to go on from an older one") from None
    if path is None:
        raise CheckpointError(f"{directory}/engine holds no DeepSpeed checkpoint; remove {directory} to go on from an older one")
    _set_random_states(torch.load(directory / f"random_rank{rank:05d}.pt", weights_only=True))


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
