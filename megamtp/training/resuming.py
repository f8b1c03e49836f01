"""Which checkpoint a run goes on from: the newest one of which every byte is as it was written."""

from pathlib import Path

import torch.distributed as dist

from megamtp.checkpoint import store
from megamtp.cluster.environment import of_all_ranks
from megamtp.console import print_line
from megamtp.errors import CheckpointError


def newest_readable(run_directory: Path, check_files: bool) -> tuple[Path, store.Manifest] | None:
    """The newest checkpoint whose manifest can be read and, if asked for, whose files have their sizes; None if the run
    has none.

    Raises:
        CheckpointError: the run has checkpoints, but none of these; or one of another version of this program is newer.
    """
    reasons: list[str] = []
    for checkpoint in reversed(store.checkpoints(run_directory)):
        try:
            return checkpoint, store.read_manifest(checkpoint, check_files)
        except store.FormatError:
            raise
        except CheckpointError as error:
            reasons.append(str(error))
    if reasons:
        raise _none_verifies(run_directory, reasons)
    return None


def newest_verified(run_directory: Path, rank: int, world_size: int) -> tuple[Path, store.Manifest] | None:
    """The newest checkpoint that verifies, every file read by one of the ranks; None if the run has none at all.
    Collective.

    Rank 0 says which it skips and why.

    Raises:
        CheckpointError: as newest_readable; on all ranks.
    """
    reasons: list[str] = []
    found = [store.checkpoints(run_directory)]
    dist.broadcast_object_list(found, src=0)
    for checkpoint in reversed(found[0]):
        manifest, error = _verify(checkpoint, rank, world_size)
        error = next(filter(None, of_all_ranks(error)), None)
        if isinstance(error, store.FormatError):
            raise error
        if not error:
            assert manifest  # of this rank, since no rank has an error
            return checkpoint, manifest
        reasons.append(str(error))
        if rank == 0:
            print_line(f"skipped {checkpoint.name}: {error}")
    if reasons:
        raise _none_verifies(run_directory, reasons)
    return None


def _verify(checkpoint: Path, rank: int, world_size: int) -> tuple[store.Manifest | None, CheckpointError | None]:
    """(the manifest, what is wrong with this rank's share of the files)."""
    try:
        manifest = store.read_manifest(checkpoint, check_files=rank == 0)
    except CheckpointError as error:
        return None, error
    reason = store.find_damage(checkpoint, manifest, rank, world_size)
    return manifest, CheckpointError(reason) if reason else None


def _none_verifies(run_directory: Path, reasons: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{run_directory}: none of {len(reasons)} checkpoints verifies ({reasons[0]}); "
        "restore one, or begin anew: remove them, or choose another run.directory"
    )
