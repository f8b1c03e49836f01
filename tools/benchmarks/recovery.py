"""Trains a model, kills a rank and resumes: measures losses, throughput and the time lost, and generates a sample.

    %(prog)s --prepare TEXT ... --data corpus --output results

megamtp.commands.local trains on all GPUs of this machine, or on two CPU ranks if there is no GPU. At step --kill-at, a
rank is killed with SIGKILL, which ends the job. The benchmark starts the job again, and it resumes from its newest
checkpoint. The trained model is converted to the format hf and generates text after --prompt.
"""

import argparse
import dataclasses
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from matplotlib.figure import Figure

from benchmarks import corpora, emulation, output
from benchmarks.processes import call
from megamtp.commands import local
from megamtp.errors import InputError
from megamtp.training.metrics import FILE as METRICS
from megamtp.training.metrics import records_until

SMOKE = corpora.SMOKE | {
    "heads": 2,
    "steps": 80,
    "save_every": 10,
    "kill_at": 25,
    "rank": 0,
    "run": Path("run"),
    "set": [
        *emulation.TINY,
        "train.sequence_length=32",
        "train.micro_batch_size=2",
        "train.global_batch_tokens=128",
        "train.precision=fp32",
        "run.evaluation_windows=4",
    ],
}
POINT_STEPS = 20  # one point of a curve is the mean over about this many steps


def main(arguments: list[str]) -> None:
    """Runs the benchmark. Raises InputError."""
    parser = output.parser(__doc__, "recovery")
    corpora.add_options(parser)
    parser.add_argument("--size", default="0.3b", choices=emulation.SIZES, help="model [0.3b]")
    parser.add_argument("--heads", type=output.positive, default=4, help="number of heads [4]")
    parser.add_argument("--steps", type=output.positive, default=1000, help="steps of the training [1000]")
    parser.add_argument(
        "--save-every", type=output.positive, default=200, metavar="STEPS", help="steps between checkpoints [200]"
    )
    parser.add_argument(
        "--kill-at",
        type=output.positive,
        default=500,
        metavar="STEP",
        help="kill the rank when this step is in the metrics [500]",
    )
    parser.add_argument("--rank", type=int, default=1, help="rank to kill [1]")
    parser.add_argument(
        "--run", type=Path, default=Path("runs/recovery"), help="folder of the training [runs/recovery]"
    )
    parser.add_argument("--prompt", default="def main(", help="prompt of the sample [def main(]")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings")
    options = output.parse(parser, arguments, SMOKE)
    if not options.save_every < options.kill_at < options.steps:
        raise InputError(
            f"--save-every {options.save_every} --kill-at {options.kill_at} --steps {options.steps}; expected "
            "save-every < kill-at < steps"
        )
    if options.run.exists():
        raise InputError(
            f"--run {options.run} exists; expected a new folder: the training must start at its first step"
        )
    output.make_folder(options)
    corpora.prepare(options)
    overrides = _overrides(options)
    kill = train_and_kill(overrides, options.run, options.kill_at, options.rank)
    recovery = train_to_the_end(overrides, options.run)
    records = [json.loads(line) for line in records_until(options.run / METRICS, options.steps)]
    result = {
        **dataclasses.asdict(kill),
        **dataclasses.asdict(recovery),
        "records": records,
        "prompt": options.prompt,
        "sample": _sample(options.run, options.prompt),
    }
    settings = {
        "size": options.size,
        "n": options.heads,
        "ranks": local.num_ranks(),
        "steps": options.steps,
        **({"set": " ".join(options.set)} if options.set else {}),
    }
    output.write(options, settings, [result], tables([result]), _draw(result, options.heads))


def _overrides(options: argparse.Namespace) -> list[str]:
    return [
        *emulation.model_arguments(options.size, options.heads),
        *corpora.overrides(options.data),
        f"data.tokenizer={options.data}/tokenizer.model",
        f"run.directory={options.run}",
        f"train.steps={options.steps}",
        f"optimizer.warmup_steps={options.steps // 10}",
        f"run.evaluate_every_steps={options.save_every}",
        f"run.save_every_steps={options.save_every}",
        "run.tensorboard=false",
        *options.set,
    ]


@dataclass(frozen=True)
class Kill:
    """A killed rank.

    Attributes:
        killed_step: last step in the metrics before the kill.
        status: exit status of the job.
        seconds_to_end: from the kill to the end of the job.
    """

    killed_step: int
    killed_rank: int
    status: int
    seconds_to_end: float


@dataclass(frozen=True)
class Recovery:
    """The second start of the job.

    Attributes:
        resumed_step: step of the checkpoint from which the job resumed.
        seconds_to_step: from the second start to the end of the first new step.
    """

    resumed_step: int
    seconds_to_step: float


class RecoveryJob:
    """A training with megamtp.commands.local, ended when the `with` block ends. Error messages contain `when`."""

    def __init__(self, overrides: list[str], run: Path, when: str):
        self.metrics, self.when = run / METRICS, when
        self.process = subprocess.Popen([sys.executable, "-m", "megamtp.commands.local", *overrides])

    def __enter__(self) -> "RecoveryJob":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits until a condition is true. Raises InputError if the training ends first."""
        while not condition():
            if self.process.poll() is not None:
                raise InputError(
                    f"the training ended with status {self.process.returncode} {self.when}; expected it to run"
                )
            time.sleep(0.05)

    def last_step(self) -> int:
        """Returns the last step in the metrics, or 0 before the first step."""
        lines = records_until(self.metrics, sys.maxsize)
        return max((json.loads(line)["step"] for line in lines), default=0)

    def process_of_rank(self, rank: int) -> psutil.Process:
        """Returns the process of a rank. Raises InputError if there is no such rank."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            words = process.cmdline()
            if "deepspeed.launcher.launch" not in words and process.environ().get("RANK") == str(rank):
                return process
        raise InputError(f"--rank {rank}; expected a rank of the job")


def train_and_kill(overrides: list[str], run: Path, step: int, rank: int) -> Kill:
    """Trains until `step` is in the metrics, kills a rank, and waits for the end of the job."""
    with RecoveryJob(overrides, run, f"before step {step}, at which a rank is killed") as job:
        job.wait_until(lambda: job.last_step() >= step)
        job.process_of_rank(rank).kill()
        start, last = time.time(), job.last_step()
        status = job.process.wait()
        return Kill(last, rank, status, time.time() - start)


def train_to_the_end(overrides: list[str], run: Path) -> Recovery:
    """Starts the job again and waits for its end. Raises InputError if it fails."""
    old_inode = (run / METRICS).stat().st_ino
    with RecoveryJob(overrides, run, "after a rank had been killed") as job:
        start = time.time()
        # a resumed run first rewrites the metrics up to its checkpoint
        job.wait_until(lambda: (run / METRICS).stat().st_ino != old_inode)
        resumed = job.last_step()
        job.wait_until(lambda: job.last_step() > resumed)
        seconds = time.time() - start
        if job.process.wait():
            raise InputError(f"the training ended with status {job.process.returncode} {job.when}; expected 0")
        return Recovery(resumed, seconds)


def _sample(run: Path, prompt: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        call("megamtp.commands.convert_checkpoint", str(run), f"{folder}/hf", "--to", "hf")
        command = ["-m", "megamtp.commands.generate", f"{folder}/hf", "--prompt", prompt, "--temperature", "0.8"]
        return subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True).stdout


def tables(results: list[dict]) -> str:
    [result] = results
    training = [record for record in result["records"] if record["kind"] == "train"]
    *_, validation = (record for record in result["records"] if record["kind"] == "validation")
    rows = [
        [
            "tokens/s, median of all steps",
            f"{statistics.median(record['tokens_per_second'] for record in training):,.0f}",
        ],
        [
            f"validation loss by head at step {validation['step']}, nats",
            " ".join(f"{loss:.3f}" for loss in validation["losses"]),
        ],
        ["killed rank", f"{result['killed_rank']}, after step {result['killed_step']}"],
        ["end of the job", f"with status {result['status']}, {result['seconds_to_end']:.1f} s after the kill"],
        [
            "second start",
            f"resumed from step {result['resumed_step']}; first new step after {result['seconds_to_step']:.1f} s",
        ],
    ]
    return (
        f"{output.table(['quantity', 'value'], rows)}\n\nA sample of the converted "
        f"model:\n\n```\n{result['sample'].rstrip()}\n```"
    )


def _draw(result: dict, heads: int) -> Figure:
    records = [record for record in result["records"] if record["kind"] == "train"]
    steps, losses = np.array([r["step"] for r in records]), np.array([r["losses"] for r in records])
    figure, (axes,) = output.figure(8, 4.5)
    points = max(1, len(steps) // POINT_STEPS)
    for head in range(heads):
        curve = [part.mean() for part in np.array_split(losses[:, head], points)]
        axes.plot([part.mean() for part in np.array_split(steps, points)], curve, label=f"head {head + 1}")
    axes.axvline(result["resumed_step"], color="0.4", linewidth=0.8, label="checkpoint of the resumed job")
    axes.axvline(result["killed_step"], color="C3", linewidth=0.8, label="rank killed")
    axes.set(xlabel="optimizer step", ylabel="training loss, nats per token")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure
