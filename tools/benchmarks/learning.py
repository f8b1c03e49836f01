"""Compares training in fp8 (losses, or losses and layers) with training in bf16: a 0.3B model with 4 heads.

All trainings read the same data and start from the same weights.

    %(prog)s --prepare TEXT ... --data corpus --output results

Each training is a run of megamtp.pretrain in --runs. If you run the benchmark again, it resumes interrupted trainings
and only reads the metrics of finished ones.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks import corpora, emulation, output
from benchmarks.processes import call
from megamtp.config import RESOLVED, read_config
from megamtp.errors import InputError
from megamtp.training.metrics import FILE as METRICS
from megamtp.training.metrics import records_until

ROOT = Path(__file__).parents[2]
VARIANTS = {
    "bf16": [],
    "fp8": ["head_loss.precision=fp8"],
    "all-fp8": ["train.precision=fp8"],
    "fp8-heads-2-to-n": ["head_loss.precision=fp8", "head_loss.fp8_first_head=false"],
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
LAST_STEPS = 100  # the final training loss is the mean over these steps
POINT_STEPS = 20  # one point of a curve is the mean over this many steps


@dataclass(frozen=True)
class TrainingLosses:
    """The losses of one training, in nats per token.

    Attributes:
        training: [steps, heads].
        last_validation: [heads].
    """

    training: np.ndarray
    last_validation: np.ndarray

    @property
    def final_training(self) -> np.ndarray:
        return self.training[-LAST_STEPS:].mean(0)

    @property
    def curve(self) -> np.ndarray:
        """Means over POINT_STEPS steps, [points, heads]."""
        points = len(self.training) // POINT_STEPS
        return self.training[: points * POINT_STEPS].reshape(points, POINT_STEPS, self.training.shape[1]).mean(1)


def main(arguments: list[str]) -> None:
    """Runs the benchmark. Raises InputError."""
    parser = output.parser(__doc__, "learning")
    corpora.add_options(parser)
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["bf16", "fp8"],
        choices=VARIANTS,
        help="losses to train with; the others are compared with the first [bf16 fp8]",
    )
    parser.add_argument("--steps", type=output.positive, default=2000, help="steps of each training [2000]")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings of all trainings")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/learning"), help="folder of the trainings [runs/learning]"
    )
    options = output.parse(parser, arguments, SMOKE)
    output.make_folder(options)
    corpora.prepare(options)
    by_variant = {}
    for name in options.variants:
        run = options.runs / name
        if not _finished(run / METRICS, options.steps):
            call("megamtp.pretrain", *_overrides(options.data, run, options.steps), *VARIANTS[name], *options.set)
        by_variant[name] = read(run / METRICS, options.steps)
    config = read_config([str(options.runs / options.variants[0] / RESOLVED)])
    settings = {
        "model": "0.3B, n = 4",
        "steps": options.steps,
        "tokens a step": config.train.global_batch_tokens,
        "training loss": f"mean of the last {LAST_STEPS}",
        **({"set": " ".join(options.set)} if options.set else {}),
    }
    output.write(options, settings, results(by_variant), tables(results(by_variant)), draw(by_variant))


def _overrides(data: Path, run: Path, steps: int) -> list[str]:
    """Returns arguments with the paper's learning rate, 1/1024 of its batch, and warm-up over 1/10 of the steps."""
    return [
        str(ROOT / "configs/0.3b_n4.yaml"),
        *corpora.overrides(data),
        f"run.directory={run}",
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
    ]


def _finished(path: Path, steps: int) -> bool:
    records = map(json.loads, records_until(path, steps))
    return any(record["kind"] == "validation" and record["step"] == steps for record in records)


def read(path: Path, steps: int) -> TrainingLosses:
    """Returns the losses of a finished run. Raises InputError if the run did not reach its last step."""
    records = [json.loads(line) for line in records_until(path, steps)]
    training = np.array([record["losses"] for record in records if record["kind"] == "train"])
    validations = [record for record in records if record["kind"] == "validation"]
    if len(training) != steps or not validations or validations[-1]["step"] != steps:
        raise InputError(
            f"{path} has {len(training)} training steps; expected {steps}, and a validation after the last: run the "
            "benchmark again, which resumes the training"
        )
    return TrainingLosses(training, np.array(validations[-1]["losses"]))


def results(by_variant: dict[str, TrainingLosses]) -> list[dict]:
    """Returns one result per variant and head.

    A result has losses in nats per token, differences relative to the first variant, and the curve of the training.
    """
    first = next(iter(by_variant.values()))
    return [
        {
            "variant": name,
            "head": head + 1,
            "training": float(losses.final_training[head]),
            "training_difference": float(losses.final_training[head] / first.final_training[head] - 1),
            "validation": float(losses.last_validation[head]),
            "validation_difference": float(losses.last_validation[head] / first.last_validation[head] - 1),
            "steps_a_point": POINT_STEPS,
            "curve": losses.curve[:, head].round(4).tolist(),
        }
        for name, losses in by_variant.items()
        for head in range(len(losses.last_validation))
    ]


def tables(results: list[dict]) -> str:
    header = ["losses", "head", "training loss", "difference", "validation loss", "difference"]
    return output.table(
        header,
        [
            [
                r["variant"],
                str(r["head"]),
                f"{r['training']:.4f}",
                f"{r['training_difference']:+.2%}",
                f"{r['validation']:.4f}",
                f"{r['validation_difference']:+.2%}",
            ]
            for r in results
        ],
    )


def draw(by_variant: dict[str, TrainingLosses]) -> Figure:
    """Draws the loss curves of all variants and, beside them, their differences from the first variant."""
    (first_name, first), *others = by_variant.items()
    figure, (loss_axes, difference_axes) = output.figure(11, 5, columns=2)
    steps = POINT_STEPS * np.arange(1, len(first.curve) + 1)
    colors = colormaps["viridis"](np.linspace(0.05, 0.8, first.curve.shape[1]))
    for (name, variant_losses), style in zip(by_variant.items(), ("-", "--", ":"), strict=False):
        for head, color in enumerate(colors):
            loss_axes.plot(
                steps,
                variant_losses.curve[:, head],
                style,
                color=color,
                linewidth=1.2,
                label=f"head {head + 1}, {name}",
            )
    for (name, variant_losses), style in zip(others, ("--", ":"), strict=False):
        for head, color in enumerate(colors):
            relative = 100 * (variant_losses.curve[:, head] / first.curve[:, head] - 1)
            difference_axes.plot(steps, relative, style, color=color, linewidth=1.2, label=f"head {head + 1}, {name}")
    loss_axes.set(xlabel="optimizer step", ylabel="training loss, nats per token", title="0.3B, n = 4")
    difference_axes.set(
        xlabel="optimizer step", ylabel=f"relative difference from {first_name}, %", title="training loss"
    )
    difference_axes.axhline(0, color="0.5", linewidth=0.8)
    for axes in (loss_axes, difference_axes):
        axes.grid(alpha=0.25)
    loss_axes.legend(frameon=False, fontsize="small")
    return figure
