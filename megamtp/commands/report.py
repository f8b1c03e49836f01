"""Plots a run's losses to RUN_DIRECTORY/loss.png and prints them next to the corpus's unigram entropy.

    %(prog)s runs/quickstart
    %(prog)s runs/quickstart --min-margin 1.0

The unigram entropy is the loss of a model that knows only how often each token occurs. With --min-margin the exit
status is 1 unless head 1's last validation loss is at least this many nats below it, and the loss of each further head
is above that of the head before. A warning names each head whose last validation loss is above the unigram entropy, or
more than 0.02 nats above its lowest: the model then memorises its training text.
"""

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from megamtp.commands.command_line import Parser, run
from megamtp.config import RESOLVED, Config, read_config
from megamtp.data.corpus import SUMMARY
from megamtp.errors import InputError
from megamtp.training.metrics import FILE as METRICS
from megamtp.training.metrics import read_record

PICTURE = "loss.png"
LARGEST_LOSS = float(np.finfo(np.float32).max)  # losses are computed in fp32
MAX_RISE = 0.02  # nats of a validation loss above its minimum before a warning: 2 % of the perplexity


@dataclass(frozen=True)
class Losses:
    """The records of one kind: steps [records], and losses [records, n] in nats per token."""

    steps: np.ndarray
    losses: np.ndarray

    def last(self, index: int) -> float | None:
        """Returns the last loss of one head, or None if there is no record."""
        return float(self.losses[-1, index]) if len(self.steps) else None


def main() -> None:
    """Prints the report. Exits with status 1 if a check of --min-margin fails. Raises InputError."""
    parser = Parser(__doc__)
    parser.add_argument("run_directory", type=Path, help="run.directory of the run")
    parser.add_argument(
        "--min-margin",
        type=float,
        metavar="NATS",
        help="check that head 1's last validation loss is at least this many nats below the unigram entropy, and that "
        "the loss of each further head is above that of the head before",
    )
    arguments = parser.parse_args()
    run_directory = arguments.run_directory
    if not os.path.isfile(run_directory / RESOLVED):  # Path.is_file raises if the name is too long
        problem = f"has no {RESOLVED}" if os.path.isdir(run_directory) else "is not a folder"
        raise InputError(f"{run_directory} {problem}; expected the run.directory of a run: train it first")
    config = read_config([str(run_directory / RESOLVED)])
    training, validation = read_losses(run_directory / METRICS, config.model.num_future_tokens)
    entropy = unigram_entropy(config)
    _save(draw(training, validation, entropy, run_directory.resolve().name), run_directory / PICTURE)
    _print_table(training, validation, entropy)
    _print_warnings(validation, entropy)
    if arguments.min_margin is not None and not _check(validation, entropy, arguments.min_margin):
        sys.exit(1)


def read_losses(path: Path, num_heads: int) -> tuple[Losses, Losses]:
    """Returns the training losses and the validation losses."""
    series: dict[str, tuple[list[int], list[list[float]]]] = {"train": ([], []), "validation": ([], [])}
    try:
        lines = path.read_text(errors="replace").splitlines(keepends=True)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}); expected the metrics of a run: train it first") from None
    for number, line in enumerate(lines, start=1):
        try:
            record = read_record(line)
            if record["kind"] in series:
                steps, losses = series[record["kind"]]
                losses.append(_losses(record, num_heads))
                steps.append(record["step"])
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                break  # the run is still writing it, or was killed while it did
            raise InputError(
                f"{path}, line {number} is damaged ({error!r}); expected a run's metrics: remove the line"
            ) from None
    if not series["train"][0]:
        raise InputError(f"{path} has no training step; expected at least one: train longer")
    training, validation = (
        Losses(np.array(steps), np.array(losses).reshape(-1, num_heads)) for steps, losses in series.values()
    )
    return training, validation


def _losses(record: dict[str, Any], num_heads: int) -> list[float]:
    """Returns the loss of each head, NaN for null. Raises ValueError if the record is damaged."""
    losses = record.get("losses")
    if not isinstance(losses, list) or len(losses) != num_heads:
        raise ValueError(f"the record has no list of {num_heads} losses, one per head")
    for loss in losses:
        if loss is not None and (type(loss) not in (int, float) or abs(loss) > LARGEST_LOSS):
            raise ValueError("a loss is not a number within the range of fp32")
    return [math.nan if loss is None else float(loss) for loss in losses]


def unigram_entropy(config: Config) -> float | None:
    """Returns the validation split's unigram entropy in nats per token, or None without prepare_data's summary."""
    if config.data.validation is None:
        return None
    path = Path(config.data.validation).parent / SUMMARY
    if not os.path.exists(path):
        return None
    try:
        entropy = json.loads(path.read_text())["unigram_entropy"]
        if type(entropy) not in (int, float) or not 0 <= entropy <= LARGEST_LOSS:
            raise ValueError("not a number of nats")
        return float(entropy)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged ({error!r}); expected the validation split's unigram entropy: prepare the data again"
        ) from None


def draw(training: Losses, validation: Losses, entropy: float | None, title: str) -> Figure:
    """Returns a figure of every head's training and validation losses, and of the unigram entropy if it is known."""
    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    num_heads = training.losses.shape[1]
    colors = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.8, num_heads))
    for index, color in enumerate(colors):
        axes.plot(training.steps, _smooth(training.losses[:, index]), color=color, alpha=0.45, linewidth=1)
    for index, color in enumerate(colors):
        label = f"head {index + 1}" + (" (next token)" if index == 0 else "")
        axes.plot(validation.steps, validation.losses[:, index], color=color, marker="o", markersize=4, label=label)
    if entropy is not None:
        axes.axhline(entropy, color="0.3", linestyle="--", linewidth=1, label="unigram entropy")
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token")
    axes.set_title(title, parse_math=False)  # dollar signs in the name are not formulas
    axes.set_title("dots: validation\nlight lines: training", loc="right", fontsize="small", color="0.3")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def _save(figure: Figure, path: Path) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        figure.savefig(partial, format="png")
        os.replace(partial, path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror}; make room, or make the folder writable"
        ) from None


def _smooth(values: np.ndarray) -> np.ndarray:
    """Returns for each step the mean of the finite losses at most 1 % of all steps away.

    The range is one-sided at the first and last steps. A range that shrank to stay symmetric would leave the noise of
    single steps at both ends.
    """
    positions, reach = np.arange(len(values)), len(values) // 100
    first, end = np.maximum(positions - reach, 0), np.minimum(positions + reach + 1, len(values))
    finite = np.isfinite(values)
    sums, counts = (np.concatenate([[0.0], np.cumsum(terms)]) for terms in (np.where(finite, values, 0.0), finite))
    sums, counts = (cumulative[end] - cumulative[first] for cumulative in (sums, counts))
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _print_table(training: Losses, validation: Losses, entropy: float | None) -> None:
    print(f"{'head':>4}  {'training loss':>13}  {'validation loss':>15}  {'below unigram entropy':>21}")
    for index in range(training.losses.shape[1]):
        loss = validation.last(index)
        margin = entropy - loss if entropy is not None and loss is not None else None
        print(f"{index + 1:>4}  {_format(training.last(index)):>13}  {_format(loss):>15}  {_format(margin):>21}")


def _format(nats: float | None) -> str:
    return "-" if nats is None else f"{nats:.4f}"


def _print_warnings(validation: Losses, entropy: float | None) -> None:
    for head, losses in enumerate(validation.losses.T if len(validation.steps) else (), start=1):
        last, lowest = losses[-1], np.fmin.reduce(losses)
        if last > lowest + MAX_RISE:
            step = validation.steps[np.flatnonzero(losses == lowest)[-1]]
            print(
                f"WARNING: head {head}'s validation loss rises: {last:.4f} is {last - lowest:.4f} above its lowest, "
                f"{lowest:.4f} at step {step}; train fewer steps, or on more text"
            )
        if entropy is not None and last > entropy:
            print(f"WARNING: head {head}'s validation loss {last:.4f} is above the unigram entropy {entropy:.4f}")


def _check(validation: Losses, entropy: float | None, min_margin: float) -> bool:
    """Prints a line for each check. Returns whether all checks pass."""
    if not len(validation.steps) or entropy is None:
        raise InputError(
            "--min-margin without validation losses or unigram entropy; expected a run with data.validation, and "
            f"prepare_data's {SUMMARY} next to it: train with these, or omit --min-margin"
        )
    losses = validation.losses[-1]
    margin = entropy - losses[0]
    passes = bool(margin >= min_margin)  # False for NaN
    _print_check(
        passes, f"head 1's loss {losses[0]:.4f} is {margin:.4f} nats below the unigram entropy, expected {min_margin:g}"
    )
    for index in range(1, len(losses)):
        is_above = bool(losses[index] > losses[index - 1])
        _print_check(
            is_above,
            f"head {index + 1}'s loss {losses[index]:.4f}, expected above head {index}'s {losses[index - 1]:.4f}",
        )
        passes = passes and is_above
    return passes


def _print_check(passes: bool, result: str) -> None:
    print(f"{'OK' if passes else 'FAILED'}: {result}")


def entry() -> None:
    """Runs the command line of megamtp-report."""
    run(main)


if __name__ == "__main__":
    entry()
