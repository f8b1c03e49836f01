"""Draws a run's losses to RUN_DIRECTORY/loss.png and prints them beside the corpus's unigram entropy.

    python -m megamtp.commands.report runs/quickstart
    python -m megamtp.commands.report runs/quickstart --min-margin 1.0

The unigram entropy is the loss of a model that knows how often each token occurs, and nothing else. With --min-margin
the exit status is 1 unless head 1 has learned that much more. A warning names each head whose last validation loss lies
above the unigram entropy, or more than 0.02 nats above its lowest: from there on the model has learned its training
text by heart.
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
RISE = 0.02  # nats by which a validation loss exceeds its minimum before it is said to rise: 2 % of the perplexity


@dataclass(frozen=True)
class Losses:
    """One kind of record: steps [records], and losses [records, n] in nats per token."""

    steps: np.ndarray
    losses: np.ndarray

    def last(self, index: int) -> float | None:
        return float(self.losses[-1, index]) if len(self.steps) else None


def main() -> None:
    """Exits with status 1 if a check asked for fails. Raises InputError."""
    parser = Parser(__doc__)
    parser.add_argument("run_directory", type=Path)
    parser.add_argument(
        "--min-margin",
        type=float,
        metavar="NATS",
        help="check that head 1's last validation loss is at least this far below the unigram entropy, and that each "
        "further head's is above the one before it",
    )
    arguments = parser.parse_args()
    run_directory = arguments.run_directory
    if not os.path.isfile(run_directory / RESOLVED):  # unlike Path's, False where the name is too long
        found = f"holds no {RESOLVED}" if os.path.isdir(run_directory) else "is no folder"
        raise InputError(f"{run_directory} {found}; expected the folder of a run (run.directory): train there first")
    config = read_config([str(run_directory / RESOLVED)])
    training, validation = read_losses(run_directory / METRICS, config.model.num_future_tokens)
    entropy = unigram_entropy(config)
    _save(draw(training, validation, entropy, run_directory.resolve().name), run_directory / PICTURE)
    _print_table(training, validation, entropy)
    _print_warnings(validation, entropy)
    if arguments.min_margin is not None and not _check(validation, entropy, arguments.min_margin):
        sys.exit(1)


def read_losses(path: Path, num_heads: int) -> tuple[Losses, Losses]:
    """The training and the validation losses."""
    found: dict[str, tuple[list[int], list[list[float]]]] = {"train": ([], []), "validation": ([], [])}
    try:
        lines = path.read_text(errors="replace").splitlines(keepends=True)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}); expected the metrics of a run: train there first") from None
    for number, line in enumerate(lines, start=1):
        try:
            record = read_record(line)
            if record["kind"] in found:
                steps, losses = found[record["kind"]]
                losses.append(_losses(record, num_heads))
                steps.append(record["step"])
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                break  # being written, or cut short when the run was killed
            raise InputError(
                f"{path}, line {number} is damaged ({error!r}); expected a run's metrics: remove the line"
            ) from None
    if not found["train"][0]:
        raise InputError(f"{path} holds no training step; expected at least one: train longer")
    training, validation = (
        Losses(np.array(steps), np.array(losses).reshape(-1, num_heads)) for steps, losses in found.values()
    )
    return training, validation


def _losses(record: dict[str, Any], num_heads: int) -> list[float]:
    """Of each head, NaN where it was no number. Raises: ValueError if they are damaged."""
    losses = record.get("losses")
    if not isinstance(losses, list) or len(losses) != num_heads:
        raise ValueError(f"no list of losses, one for each of {num_heads} heads")
    for loss in losses:
        if loss is not None and (type(loss) not in (int, float) or abs(loss) > LARGEST_LOSS):
            raise ValueError("a loss that is no number of fp32")
    return [math.nan if loss is None else float(loss) for loss in losses]


def unigram_entropy(config: Config) -> float | None:
    """Of the validation split, in nats per token, as prepare_data wrote it; None for a corpus of other make."""
    if config.data.validation is None:
        return None
    path = Path(config.data.validation).parent / SUMMARY
    if not os.path.exists(path):
        return None
    try:
        entropy = json.loads(path.read_text())["unigram_entropy"]
        if type(entropy) not in (int, float) or not 0 <= entropy <= LARGEST_LOSS:
            raise ValueError("no number of nats")
        return float(entropy)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged ({error!r}); expected the validation split's unigram entropy: prepare the data again"
        ) from None


def draw(training: Losses, validation: Losses, entropy: float | None, title: str) -> Figure:
    """Every head's training and validation losses, and the unigram entropy if it is known."""
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
    axes.set_title(title, parse_math=False)  # a name may have dollar signs
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
        raise InputError(f"{path} cannot be written: {error.strerror}; make room or the folder writable") from None


def _smooth(values: np.ndarray) -> np.ndarray:
    """The mean of the steps at most 1 % of all away, of those whose loss is a number.

    At an end these lie on one side: a window that shrank to stay symmetric would leave a spike of single steps there.
    """
    positions, reach = np.arange(len(values)), len(values) // 100
    first, end = np.maximum(positions - reach, 0), np.minimum(positions + reach + 1, len(values))
    known = np.isfinite(values)
    sums, counts = (np.concatenate([[0.0], np.cumsum(each)]) for each in (np.where(known, values, 0.0), known))
    sums, counts = (each[end] - each[first] for each in (sums, counts))
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _print_table(training: Losses, validation: Losses, entropy: float | None) -> None:
    print(f"{'head':>4}  {'training loss':>13}  {'validation loss':>15}  {'below unigram entropy':>21}")
    for index in range(training.losses.shape[1]):
        valid = validation.last(index)
        margin = entropy - valid if entropy is not None and valid is not None else None
        print(f"{index + 1:>4}  {_shown(training.last(index)):>13}  {_shown(valid):>15}  {_shown(margin):>21}")


def _shown(nats: float | None) -> str:
    return "-" if nats is None else f"{nats:.4f}"


def _print_warnings(validation: Losses, entropy: float | None) -> None:
    for head, losses in enumerate(validation.losses.T if len(validation.steps) else (), start=1):
        last, lowest = losses[-1], np.fmin.reduce(losses)
        if last > lowest + RISE:
            step = validation.steps[np.flatnonzero(losses == lowest)[-1]]
            print(
                f"WARNING: head {head}'s validation loss rises: {last:.4f} is {last - lowest:.4f} above its lowest, "
                f"{lowest:.4f} at step {step}; train fewer steps, or on more text"
            )
        if entropy is not None and last > entropy:
            print(f"WARNING: head {head}'s validation loss {last:.4f} lies above the unigram entropy {entropy:.4f}")


def _check(validation: Losses, entropy: float | None, min_margin: float) -> bool:
    """Prints a line for each check; True if all hold."""
    if not len(validation.steps) or entropy is None:
        raise InputError(f"--min-margin needs validation losses, and prepare_data's {SUMMARY} beside data.validation")
    losses = validation.losses[-1]
    margin = entropy - losses[0]
    good = bool(margin >= min_margin)  # False for a loss that is no number
    _say(good, f"head 1's loss {losses[0]:.4f} is {margin:.4f} nats below the unigram entropy, expected {min_margin:g}")
    for index in range(1, len(losses)):
        above = bool(losses[index] > losses[index - 1])
        _say(
            above, f"head {index + 1}'s loss {losses[index]:.4f}, expected above head {index}'s {losses[index - 1]:.4f}"
        )
        good = good and above
    return good


def _say(good: bool, finding: str) -> None:
    print(f"{'OK' if good else 'FAILED'}: {finding}")


def entry() -> None:
    run(main)


if __name__ == "__main__":
    entry()
