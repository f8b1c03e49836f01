"""Kills runs of two ranks with SIGKILL at random moments, also during saves, and restarts them until they finish.

    python -m tests.end_to_end.kill_campaign /tmp/kills --runs 50 configs/quickstart.yaml data.train=... train.steps=24

Every final state must be bitwise equal to that of an uninterrupted run. test_killed.py runs a short campaign.
"""

import argparse
import random
import sys
import time
from pathlib import Path

from megamtp.checkpoint.store import newest_checkpoint, verify
from tests.end_to_end.jobs import ForkedJob, losses, start_pretrain

SAVING_SECONDS = 0.03  # a kill during a save comes within this time after the save has begun
SURVIVOR_SECONDS = 1.0  # time for a rank to notice that its peer was killed


class Killer:
    """Starts a job repeatedly and kills it at random times."""

    def __init__(self, arguments: list[str], run_directory: Path, seed: int):
        self.arguments, self.directory = [*arguments, f"run.directory={run_directory}"], run_directory
        self.random = random.Random(seed)

    def run_killed(self, ranks: tuple[int, ...], saving: bool, after_steps: int) -> str:
        """Starts the job and kills some of its ranks. Returns a line that says what happened.

        Args:
            ranks: the ranks to kill.
            saving: kill them during a save.
            after_steps: number of steps that the job takes before the kill.
        """
        before = self._num_steps()
        with self._start() as job:
            self._wait(job, lambda: self._num_steps() >= before + after_steps)
            if saving:
                self._wait(job, lambda: list((self.directory / "checkpoints").glob("*.partial")))
            time.sleep(self.random.uniform(0, SAVING_SECONDS if saving else 0.3))
            running = [rank for rank in ranks if job.ranks[rank].is_alive()]
            for rank in ranks:
                job.ranks[rank].kill()
            for process in job.ranks:
                process.join(SURVIVOR_SECONDS)
        leftovers = [path.name for path in (self.directory / "checkpoints").glob("*.partial")]
        return f"killed ranks {running} after {self._num_steps()} steps; left {leftovers}"

    def run_to_the_end(self) -> None:
        """Runs the job until it finishes. Raises AssertionError with the output of a rank that fails."""
        with self._start() as job:
            finished = job.wait(timeout=600)
        assert finished.returncode == 0, finished.stdout + finished.stderr

    def _num_steps(self) -> int:
        """Returns the number of steps in metrics.jsonl."""
        path = self.directory / "metrics.jsonl"
        return path.read_text().count('"kind": "train"') if path.exists() else 0

    def _start(self) -> ForkedJob:
        return start_pretrain(self.arguments, 2)

    def _wait(self, job: ForkedJob, condition) -> None:
        """Waits until the condition is true or a rank has ended."""
        while not condition() and all(rank.is_alive() for rank in job.ranks):
            time.sleep(0.001)


def final_state(run_directory: Path) -> tuple[list, dict, dict]:
    """Returns the losses of all steps, and the checksums and the counters of the last checkpoint."""
    manifest = verify(newest_checkpoint(run_directory))
    return losses(run_directory), manifest.files, manifest.state


def main() -> None:
    """Runs the campaign. Exits with status 1 at the first final state that differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options, arguments = parser.parse_known_args()
    arguments = ["run.save_every_steps=2", "run.tensorboard=false", *arguments]
    Killer(arguments, options.folder / "whole", 0).run_to_the_end()
    expected, during_saves = final_state(options.folder / "whole"), 0
    for index in range(options.runs):
        killer = Killer(arguments, options.folder / f"killed{index}", options.seed + index)
        ranks, saving = ((0,), (1,), (0, 1))[index % 3], index % 2 == 0
        outcome = killer.run_killed(ranks, saving, killer.random.randint(1, len(expected[0]) * 2 // 3))
        during_saves += "partial" in outcome
        killer.run_to_the_end()
        same = final_state(killer.directory) == expected
        print(f"run {index}: {outcome}; {'bitwise equal' if same else 'DIFFERENT'}", flush=True)
        if not same:
            sys.exit(1)
    print(
        f"{options.runs} runs killed, {during_saves} with a checkpoint partly written or removed; all final states "
        "bitwise equal"
    )


if __name__ == "__main__":
    main()
