"""Compares training in fp8 (losses, or losses and layers) with training in bf16: a model with 4 heads.

Trainings of one seed read the same data and start from the same weights.

    %(prog)s --prepare TEXT ... --data corpus --output results
    %(prog)s --data corpus --variants bf16 all-fp8 fault --seeds 0 1 --steps 3000 --jobs 2 --output results

The validation loss of every head should differ from that of the first variant by at most 0.5 %%. The gap should not
grow. It is the magnitude of the mean relative difference between the training losses, over all heads and seeds. In the
last third of the steps it should be at most as large as in the middle third plus two standard errors. A standard error
comes from differences averaged over 20 steps, as if these averages were independent. Errors of heads are added, because
heads share the data; seeds count as independent.

The variant "fault" shows that the comparison can fail. It is all-fp8 with gradients in e4m3 without a scale
(benchmarks/unscaled_gradients.py), and should exceed the bound. With --fault-steps it ends early, and is compared at
its last validation. It also exceeds the bound if it ends because a loss or a gradient is not finite.

Each training is a run of megamtp.pretrain in --runs. If you run the benchmark again, it resumes interrupted trainings
and only reads the metrics of finished ones. With --jobs, each training has a log in the folder of its run.
"""

import argparse
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import corpora, emulation, output
from benchmarks.comparison import FAULT, LAST_STEPS, Losses, results, steps_a_point, tables, thirds
from benchmarks.trainings import TrainingRun, train_all
from megamtp.commands.command_line import Parser
from megamtp.config import RESOLVED, read_config
from megamtp.errors import InputError

VARIANTS = {
    "bf16": [],
    "fp8": ["head_loss.precision=fp8"],
    "all-fp8": ["train.precision=fp8"],
    "fp8-heads-2-to-n": ["head_loss.precision=fp8", "head_loss.fp8_first_head=false"],
    FAULT: ["train.precision=fp8"],
}
SMOKE = corpora.SMOKE | {
    "variants": ["bf16"],  # fp8 is slow on a CPU
    "steps": 40,
    "runs": Path("runs"),
    "set": [
        *emulation.TINY,
        "train.sequence_length=32",
        "train.global_batch_tokens=128",
        "run.evaluate_every_steps=20",
        "run.evaluation_windows=4",
    ],
}
MIN_STEPS = 6  # two in each third
STYLES = ("-", "--", ":", "-.", (0, (1, 3)))


def main(arguments: list[str]) -> None:
    """Runs the benchmark. Raises InputError."""
    options = output.parse(_parser(), arguments, SMOKE)
    _check(options)
    output.make_folder(options)
    corpora.prepare(options)
    runs = {(seed, variant): _run(options, seed, variant) for seed, variant in product(options.seeds, options.variants)}
    for run in runs.values():
        run.check()
    train_all(list(runs.values()), options.jobs)
    losses = {key: run.read() for key, run in runs.items()}
    config = read_config([str(next(iter(runs.values())).directory / RESOLVED)])
    settings = {
        "model": f"{options.size.upper()}, n = {config.model.num_future_tokens}",
        "seeds": " ".join(map(str, options.seeds)),
        "steps": options.steps,
        "tokens a step": config.train.global_batch_tokens,
        "training loss": f"mean of the last {LAST_STEPS}",
        **({"set": " ".join(options.set)} if options.set else {}),
    }
    rows = results(losses)
    output.write(options, settings, rows, tables(rows), draw(losses, str(settings["model"])))


def _parser() -> Parser:
    parser = output.parser(__doc__, "learning")
    corpora.add_options(parser)
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["bf16", "fp8"],
        choices=VARIANTS,
        help="losses to train with; the others are compared with the first [bf16 fp8]",
    )
    parser.add_argument("--size", default="0.3b", choices=emulation.SIZES, help="model [0.3b]")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], help="train each variant with each of these train.seed [0]"
    )
    parser.add_argument("--steps", type=output.positive, default=2000, help="steps of each training [2000]")
    parser.add_argument(
        "--fault-steps",
        type=output.positive,
        metavar="STEPS",
        help="end the variant fault at its first validation from this step on [--steps]",
    )
    parser.add_argument("--jobs", type=output.positive, default=1, help="trainings at a time, on the GPUs in turn [1]")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings of all trainings")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/learning"), help="folder of the trainings [runs/learning]"
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    """Raises InputError if options do not fit together."""
    for name, values in (("variants", options.variants), ("seeds", options.seeds)):
        if len(set(values)) < len(values):
            raise InputError(f"--{name} {' '.join(map(str, values))}; expected each only once")
    if options.variants[0] == FAULT:
        raise InputError(f"--variants {' '.join(options.variants)}; expected another variant before {FAULT}")
    if options.steps < MIN_STEPS:
        raise InputError(f"--steps {options.steps}; expected at least {MIN_STEPS}: the comparison is by thirds")
    if options.fault_steps and (FAULT not in options.variants or options.fault_steps > options.steps):
        raise InputError(
            f"--fault-steps {options.fault_steps} with --steps {options.steps} and --variants "
            f"{' '.join(options.variants)}; expected at most --steps, and the variant {FAULT}"
        )


def _run(options: argparse.Namespace, seed: int, variant: str) -> TrainingRun:
    directory = options.runs / f"{options.size}_seed{seed}" / variant
    settings = partial(_settings, options, seed, variant)
    if variant != FAULT:
        return TrainingRun(directory, settings, options.steps)
    last_step = options.fault_steps or options.steps
    return TrainingRun(
        directory, settings, last_step, "benchmarks.unscaled_gradients", (str(last_step),), may_diverge=True
    )


def _settings(options: argparse.Namespace, seed: int, variant: str) -> list[str]:
    """Returns arguments with the paper's learning rate, 1/1024 of its batch, and warm-up over 1/10 of the steps."""
    steps = options.steps
    return [
        *emulation.model_arguments(options.size, heads=4),
        *corpora.overrides(options.data),
        f"train.seed={seed}",
        f"train.steps={steps}",
        "train.global_batch_tokens=8192",
        "train.micro_batch_size=4",
        "train.sequence_length=2048",
        "engine.kind=zero1",
        f"optimizer.warmup_steps={steps // 10}",
        f"run.evaluate_every_steps={max(1, steps // 10)}",
        "run.evaluation_windows=64",
        f"run.save_every_steps={max(1, steps // 2)}",
        "run.keep_checkpoints=1",
        "run.tensorboard=false",
        *VARIANTS[variant],
        *options.set,
        "run.log_every_steps=1",
    ]


def draw(losses: Losses, title: str) -> Figure:
    """Draws the loss curves of the first seed and, beside them, differences from the first variant, means over seeds.

    The middle and the last third of the steps are shaded. The fault is only among the loss curves: its differences are
    too large for the other panel.
    """
    (seed, first), *_ = losses
    variants = [variant for each, variant in losses if each == seed]
    num_steps, num_heads = losses[seed, first].training.shape
    width = steps_a_point(num_steps)
    colors = colormaps["viridis"](np.linspace(0.05, 0.8, num_heads))
    figure, (loss_axes, difference_axes) = output.figure(11, 5, columns=2)
    for variant, style in zip(variants, STYLES, strict=False):
        _plot(loss_axes, losses[seed, variant].curve(width), width, style, colors, variant)
    compared = [variant for variant in variants if variant not in (first, FAULT)]
    for variant, style in zip(compared, STYLES, strict=False):
        relative = [
            own.curve(width) / losses[each, first].curve(width) - 1
            for (each, name), own in losses.items()
            if name == variant
        ]
        _plot(difference_axes, 100 * np.mean(relative, 0), width, style, colors, variant)
    for axes in (loss_axes, difference_axes):
        _mark_thirds(axes, num_steps)
        axes.grid(alpha=0.25)
        axes.set(xlabel="optimizer step", xlim=(0, num_steps))
    loss_axes.set(ylabel="training loss, nats per token", title=f"{title}, seed {seed}")
    num_seeds = len({each for each, _ in losses})
    difference_axes.set(
        ylabel=f"relative difference from {first}, %",
        title="training loss" + (f", mean over {num_seeds} seeds" if num_seeds > 1 else ""),
    )
    loss_axes.legend(frameon=False, fontsize="small", ncols=len(variants))
    if compared:
        difference_axes.margins(y=0.15)  # space for the legend
        difference_axes.legend(frameon=False, fontsize="small", ncols=2)
    difference_axes.axhline(0, color="0.5", linewidth=0.8)
    return figure


def _plot(axes: Axes, curves: np.ndarray, width: int, style: Any, colors: np.ndarray, variant: str) -> None:
    """Draws one line for each head. `width`: steps of a point."""
    steps = width * np.arange(1, len(curves) + 1)
    for head, color in enumerate(colors):
        label = f"head {head + 1}, {variant}"
        axes.plot(steps, curves[:, head], linestyle=style, color=color, linewidth=1, label=label)


def _mark_thirds(axes: Axes, num_steps: int) -> None:
    middle, end = thirds(num_steps)
    for name, first_step, last_step, color in (("middle", middle, end, "0.96"), ("last", end, num_steps, "0.92")):
        axes.axvspan(first_step, last_step, color=color, zorder=0)
        center = (first_step + last_step) / 2
        axes.text(center, 0.01, f"{name} third", color="0.4", ha="center", transform=axes.get_xaxis_transform())
