"""Measures the cost of checkpoints: step time while one is written, pauses of the training, and write bandwidth.

    %(prog)s --size 1.3b --output results

megamtp.commands.local trains with random tokens on all GPUs of this machine, in a temporary folder in --scratch. A step
counts as "while saving" from the copy of the state until the metrics report that the checkpoint is on disk. Training
pauses for the copy; the first copy also page-locks its memory. Training also pauses if a checkpoint is not on disk when
the next checkpoint begins or when the training ends.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks import corpora, emulation, output
from benchmarks.processes import call
from megamtp.commands import local
from megamtp.config import read_config
from megamtp.errors import InputError
from megamtp.training.metrics import FILE as METRICS
from megamtp.training.metrics import records_until

SMOKE = {
    "size": "0.3b",
    "heads": 2,
    "steps": 9,
    "save_every": 4,
    "tokens": 512,
    "set": [*emulation.TINY, "train.sequence_length=64", "train.precision=fp32"],
}
WARM_UP = 2  # steps that are not measured: they compile
MAX_RATIO = 1.1


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        seconds: without pauses for checkpoints.
        pause_seconds: of pauses of the training for checkpoints.
        saving: a checkpoint was being written.
    """

    number: int
    seconds: float
    pause_seconds: float
    saving: bool


def main(arguments: list[str]) -> None:
    """Runs the benchmark. Raises InputError."""
    parser = output.parser(__doc__, "saving")
    parser.add_argument("--size", default="1.3b", choices=emulation.SIZES, help="model [1.3b]")
    parser.add_argument("--heads", type=output.positive, default=4, help="number of heads [4]")
    parser.add_argument("--steps", type=output.positive, default=40, help="steps of the training [40]")
    parser.add_argument(
        "--save-every", type=output.positive, default=12, metavar="STEPS", help="steps between checkpoints [12]"
    )
    parser.add_argument("--tokens", type=output.positive, default=65536, help="tokens per step [65536]")
    parser.add_argument("--scratch", type=Path, help="temporary folder for the checkpoints [the system's]")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings")
    options = output.parse(parser, arguments, SMOKE)
    output.make_folder(options)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        config = read_config(_overrides(options, Path(folder)))
        corpora.write_random(Path(config.data.train), 4 * options.tokens, 1000, config.model.vocab_size)
        call("megamtp.commands.local", *_overrides(options, Path(folder)))
        records = [json.loads(line) for line in records_until(Path(folder) / METRICS, options.steps)]
    steps = steps_of(records, options.save_every)
    checkpoints = [record for record in records if record["kind"] == "checkpoint"]
    if not any(step.saving for step in steps) or all(step.saving for step in steps):
        given = f"--steps {options.steps} --save-every {options.save_every}"
        raise InputError(f"{given}: every step or none ran while saving; expected some of both")
    settings = {
        "size": options.size,
        "n": options.heads,
        "ranks": local.num_ranks(),
        "tokens a step": options.tokens,
        "saves every": options.save_every,
    }
    settings |= {"set": " ".join(options.set)} if options.set else {}
    results = [_result(step) for step in steps] + checkpoints
    output.write(options, settings, results, tables(results), _draw(steps))


def _result(step: Step) -> dict:
    return {"number": step.number, "seconds": step.seconds, "still": step.pause_seconds, "saving": step.saving}


def _overrides(options: argparse.Namespace, folder: Path) -> list[str]:
    return [
        *emulation.model_arguments(options.size, options.heads),
        f"data.train={folder}/tokens",
        f"run.directory={folder}",
        f"train.steps={options.steps}",
        "train.micro_batch_size=2",
        f"train.global_batch_tokens={options.tokens}",
        f"run.save_every_steps={options.save_every}",
        "run.keep_checkpoints=1",
        "run.log_every_steps=1",
        "run.tensorboard=false",
        *options.set,
    ]


def steps_of(records: Iterable[dict], save_every: int) -> list[Step]:
    """Returns the steps in the metrics of a training, without the first steps, which compile."""
    steps, saving = [], False
    for record in records:
        if record["kind"] == "checkpoint":
            saving = False
        elif record["kind"] == "train":
            pause_seconds = record["seconds"].pop("save", 0.0)
            saving = saving or (record["step"] > 1 and (record["step"] - 1) % save_every == 0)
            steps.append(Step(record["step"], sum(record["seconds"].values()), pause_seconds, saving))
    return steps[WARM_UP:]


def _medians(steps: list[Step]) -> tuple[float, float]:
    """Returns the median seconds of steps (without, with) a checkpoint being written."""
    other, saving = (
        statistics.median(step.seconds for step in steps if step.saving is saving) for saving in (False, True)
    )
    return other, saving


def tables(results: list[dict]) -> str:
    checkpoints = [result for result in results if result.get("kind") == "checkpoint"]
    steps = [
        Step(result["number"], result["seconds"], result["still"], result["saving"])
        for result in results
        if result.get("kind") != "checkpoint"
    ]
    return "\n\n".join([_steps_table(steps), _checkpoints_table(checkpoints), verdict(steps)])


def verdict(steps: list[Step]) -> str:
    other, saving = _medians(steps)
    ratio = saving / other
    return f"step while saving / other step: {ratio:.3f} <= {MAX_RATIO}: {output.holds_or_fails(ratio <= MAX_RATIO)}"


def _steps_table(steps: list[Step]) -> str:
    rows = []
    for name, saving in (("not saving", False), ("while saving", True)):
        milliseconds = [1e3 * step.seconds for step in steps if step.saving is saving]
        rows.append([name, str(len(milliseconds)), output.spread(milliseconds)])
    return output.table(["steps", "number of steps", "ms"], rows)


def _checkpoints_table(checkpoints: list[dict]) -> str:
    return output.table(
        ["checkpoint of step", "GB", "write time, s", "GB/s", "pause for the copy, s", "pause for the disk, s"],
        [
            [
                str(record["step"]),
                f"{record['bytes'] / 1e9:.2f}",
                f"{record['write_seconds']:.1f}",
                f"{record['bytes_per_second'] / 1e9:.2f}",
                f"{record['copy_seconds']:.2f}",
                f"{record['wait_seconds']:.2f}",
            ]
            for record in checkpoints
        ],
    )


def _draw(steps: list[Step]) -> Figure:
    figure, (axes,) = output.figure(8, 4)
    for label, saving, color in (("not saving", False, "tab:blue"), ("while saving", True, "tab:orange")):
        shown = [step for step in steps if step.saving is saving]
        axes.bar([step.number for step in shown], [step.seconds for step in shown], color=color, label=label)
    with_pause = [step for step in steps if step.pause_seconds]
    bottom = [step.seconds for step in with_pause]
    axes.bar(
        [step.number for step in with_pause],
        [step.pause_seconds for step in with_pause],
        bottom=bottom,
        color="tab:red",
        label="pause",
    )
    axes.set(xlabel="step", ylabel="seconds")
    axes.legend(frameon=False)
    return figure
