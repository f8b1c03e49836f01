"""Runs of two ranks killed with SIGKILL at random moments, while they save too, and started again until they are
finished.

    python -m tests.end_to_end.kill_campaign /tmp/campaign --runs 50 configs/quickstart.yaml train.steps=24
    data.train=...

Every final state must be, bit for bit, that of a run that nobody killed. The test suite has a short form in
test_killed.py.
"""

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path

from megamtp.checkpoint.store import newest_checkpoint, verify
from megamtp.cluster.ports import reserve_port
from tests.end_to_end.jobs import MODULE, ROOT, environment, losses

SAVING_SECONDS = 0.03  # after a save has begun to be seen, within which it is hit
SURVIVOR_SECONDS = 1.0  # that a rank whose peer was killed has to notice it


class Killer:
    """Starts a job again and again, killing it; `choice` decides when."""

    def __init__(self, arguments: list[str], run_directory: Path, seed: int):
        self.arguments, self.directory, self.choice = (
            [*arguments, f"run.directory={run_directory}"],
            run_directory,
            random.Random(seed),
        )

    def run_killed(self, ranks: tuple[int, ...], saving: bool, after_steps: int) -> str:
        """Starts it, kills `ranks` when it has taken some steps (while it saves, or at any time), and says what has
        happened.
        """
        before = self._num_steps()
        processes = self._start()
        try:
            self._wait(processes, lambda: self._num_steps() >= before + after_steps)
            if saving:
                self._wait(processes, lambda: list((self.directory / "checkpoints").glob("*.partial")))
            time.sleep(self.choice.uniform(0, SAVING_SECONDS if saving else 0.3))
            hit = [rank for rank in ranks if processes[rank].poll() is None]
            for rank in ranks:
                processes[rank].kill()
            for process in processes:
                _wait_briefly(process)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        leftovers = [path.name for path in (self.directory / "checkpoints").glob("*.partial")]
        return f"killed ranks {hit} after {self._num_steps()} steps; left {leftovers}"

    def run_to_the_end(self) -> None:
        """Raises: AssertionError with a rank's output if it fails."""
        outputs = [(process, process.communicate(timeout=600)[0]) for process in self._start(captured=True)]
        for process, output in outputs:
            assert process.returncode == 0, output

    def _num_steps(self) -> int:
        """That have been reported, by all starts together."""
        path = self.directory / "metrics.jsonl"
        return path.read_text().count('"kind": "train"') if path.exists() else 0

    def _start(self, captured: bool = False) -> list[subprocess.Popen]:
        output, port = subprocess.PIPE if captured else subprocess.DEVNULL, str(reserve_port())
        places = [
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            for rank in range(2)
        ]
        return [
            subprocess.Popen(
                [sys.executable, "-m", MODULE, *self.arguments],
                env=environment(**place),
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for place in places
        ]

    def _wait(self, processes: list[subprocess.Popen], condition) -> None:
        """Until it is true, or a rank has ended."""
        while not condition() and all(process.poll() is None for process in processes):
            time.sleep(0.001)


def _wait_briefly(process: subprocess.Popen) -> None:
    try:
        process.wait(SURVIVOR_SECONDS)
    except subprocess.TimeoutExpired:
        return


def final_state(run_directory: Path) -> tuple[list, dict, dict]:
    """Losses of all steps, checksums of all that the last checkpoint holds, and its counters."""
    manifest = verify(newest_checkpoint(run_directory))
    return losses(run_directory), manifest.files, manifest.state


def main() -> None:
    """Exits with status 1 at the first final state that differs."""
    parser = argparse.ArgumentParser(description=__doc__)
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
        told = killer.run_killed(ranks, saving, killer.choice.randint(1, len(expected[0]) * 2 // 3))
        during_saves += "partial" in told
        killer.run_to_the_end()
        same = final_state(killer.directory) == expected
        print(f"run {index}: {told}; {'bitwise equal' if same else 'DIFFERENT'}", flush=True)
        if not same:
            sys.exit(1)
    print(
        f"{options.runs} runs killed, {during_saves} with a checkpoint half-written or half-removed; all ends bitwise "
        "equal"
    )


if __name__ == "__main__":
    main()
