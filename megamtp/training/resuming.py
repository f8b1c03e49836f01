"""Chooses the checkpoint that a run resumes from: the newest checkpoint whose files are intact."""

from pathlib import Path

import torch.distributed as dist

from megamtp.checkpoint import store
from megamtp.cluster.environment import of_all_ranks
from megamtp.console import print_line
from megamtp.errors import CheckpointError


def newest_readable(run_directory: Path, check_files: bool) -> tuple[Path, store.Manifest] | None:
    """Returns the newest checkpoint with a readable manifest, or None if the run has no checkpoint.

    Args:
        check_files: also require that all files exist and have their recorded sizes.

    Raises:
        CheckpointError: the run has checkpoints, but all are damaged, or a newer one has the format of another version
            of this program.
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
        raise _none_is_intact(run_directory, reasons)
    return None


def newest_verified(run_directory: Path, rank: int, world_size: int) -> tuple[Path, store.Manifest] | None:
    """Returns the newest checkpoint whose checksums are correct, or None if the run has no checkpoint. Collective.

    Each file is read by one of the ranks. Rank 0 prints which checkpoints are skipped and why.

    Raises:
        CheckpointError: as newest_readable; on all ranks.
    """
    reasons: list[str] = []
    listing = [store.checkpoints(run_directory)]
    dist.broadcast_object_list(listing, src=0)
    for checkpoint in reversed(listing[0]):
        manifest, error = _verify(checkpoint, rank, world_size)
        error = next(filter(None, of_all_ranks(error)), None)
        if isinstance(error, store.FormatError):
            raise error
        if not error:
            assert manifest  # this rank has read it, since no rank has an error
            return checkpoint, manifest
        reasons.append(str(error))
        if rank == 0:
            print_line(f"skipped {checkpoint.name}: {error}")
    if reasons:
        raise _none_is_intact(run_directory, reasons)
    return None


def _verify(checkpoint: Path, rank: int, world_size: int) -> tuple[store.Manifest | None, CheckpointError | None]:
    """Returns the manifest, and the first problem in this rank's share of the files."""
    try:
        manifest = store.read_manifest(checkpoint, check_files=rank == 0)
    except CheckpointError as error:
        return None, error
    reason = store.find_damage(checkpoint, manifest, rank, world_size)
    return manifest, CheckpointError(reason) if reason else None


def _none_is_intact(run_directory: Path, reasons: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{run_directory}: none of {len(reasons)} checkpoints is intact ({reasons[0]}); restore one, or start over: "
        "remove them, or choose another run.directory"
    )
