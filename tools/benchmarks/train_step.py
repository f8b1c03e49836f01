"""Measures whole steps of training, as pretrain runs them: optimizer, data, losses and metrics included.

    %(prog)s --sizes 1.3b 6.7b --heads 1 2 4 --precisions bf16 fp8 --output results
    %(prog)s --sizes 1.3b --real --output results          (on all GPUs of this machine)

Each cell is a training with random tokens in a temporary folder: one rank of an emulated cluster, or one rank per GPU.
"passes" is the time of all forward and backward passes, with exposed communication. The share of a step that is not in
passes should be at most 3 %% for 1.3B and larger models. TFLOP/s count what the model needs; recomputation does not
count.
"""

import json
import statistics
import tempfile
from itertools import product
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks import corpora, emulation, output
from benchmarks.processes import call
from megamtp.commands import local
from megamtp.config import Config, write_config
from megamtp.model.cost import flops_per_token
from megamtp.training.metrics import FILE as METRICS
from megamtp.training.metrics import records_until

SMOKE = emulation.SMOKE | {"sizes": ["0.3b"], "heads": [2], "precisions": ["bf16"], "steps": 2, "world_size": 2}
WARM_UP = 3  # steps that are not measured: they compile, and record the order of gathers
SMALL = ("0.3b", "0.6b")  # sizes without a bound
MAX_OTHER_SHARE = 0.03
PARTS = ("passes", "optimizer", "data", "other")


def main(arguments: list[str]) -> None:
    """Runs the benchmark. Raises InputError."""
    parser = emulation.parser(__doc__, "train_step")
    parser.add_argument("--sizes", nargs="+", default=["1.3b", "6.7b"], choices=emulation.SIZES, help="[1.3b 6.7b]")
    parser.add_argument("--heads", nargs="+", type=output.positive, default=[1, 2, 4], help="numbers of heads [1 2 4]")
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp8"], choices=["bf16", "fp8"], help="[bf16 fp8]")
    parser.add_argument("--world-size", type=output.positive, default=64, help="emulated ranks [64]")
    parser.add_argument("--real", action="store_true", help="train on all GPUs of this machine instead")
    options = output.parse(parser, arguments, SMOKE)
    num_ranks = local.num_ranks() if options.real else options.world_size
    real = ["cluster.emulate=null", "cluster.flat_bandwidth=null"] if options.real else []
    cells = {
        (size, heads, precision): emulation.config(
            size, heads, num_ranks, options, f"train.precision={precision}", *real
        )
        for size, heads, precision in product(options.sizes, options.heads, options.precisions)
    }
    output.make_folder(options)
    results = []
    for (size, heads, precision), config in cells.items():
        results.append(
            {"size": size, "heads": heads, "precision": precision} | measure(config, options.steps, num_ranks)
        )
        output.say(f"{size} n={heads} {precision}: {output.spread(results[-1]['milliseconds'])} ms")
    first = next(iter(cells.values()))
    settings = {"ranks": num_ranks, "kind": "real" if options.real else "emulated"}
    settings |= emulation.settings(first, options)
    output.write(options, settings, results, tables(results), _draw(results))


def measure(config: Config, num_steps: int, num_ranks: int) -> dict:
    """Trains, and returns the milliseconds of each measured step and the median milliseconds of its parts.

    Raises InputError if the training fails.
    """
    train = config.train
    with tempfile.TemporaryDirectory() as folder:
        run, times, file = Path(folder) / "run", Path(folder) / "times.jsonl", Path(folder) / "config.yaml"
        corpora.write_random(Path(folder) / "tokens", 2 * train.global_batch_tokens, 1000, config.model.vocab_size)
        write_config(config, file)
        arguments = [
            str(times),
            str(file),
            f"train.steps={num_steps + WARM_UP}",
            f"data.train={folder}/tokens",
            f"run.directory={run}",
            "run.log_every_steps=1",
            "run.tensorboard=false",
        ]
        if config.cluster.emulate:
            call("benchmarks.timed_training", *arguments)
        else:
            call("benchmarks.launched_training", str(num_ranks), *arguments)
        records = [json.loads(line) for line in records_until(run / METRICS, num_steps + WARM_UP)]
        times_of_engine = [json.loads(line) for line in times.read_text().splitlines()]
    trained = [record for record in records if record["kind"] == "train"]
    tokens = train.global_batch_tokens / num_ranks
    flops = tokens * flops_per_token(config.model, train.sequence_length)
    return {"tokens": tokens, "flops": flops} | parts_of(trained[WARM_UP:], times_of_engine[WARM_UP:])


def parts_of(records: list[dict], times_of_engine: list[dict]) -> dict:
    """Returns the milliseconds of each step, and the medians of its parts.

    Args:
        records: of the metrics, whose "seconds" are the whole step by phase.
        times_of_engine: what timed_training has recorded for the same steps.
    """
    milliseconds = [1e3 * sum(record["seconds"].values()) for record in records]
    parts: dict[str, list[float]] = {part: [] for part in PARTS}
    for record, times in zip(records, times_of_engine, strict=True):
        known = {"passes": times["passes"], "optimizer": times["optimizer"], "data": record["seconds"].get("data", 0.0)}
        for part, seconds in known.items():
            parts[part].append(1e3 * seconds)
        parts["other"].append(1e3 * (sum(record["seconds"].values()) - sum(known.values())))
    return {"milliseconds": milliseconds, "parts": {part: statistics.median(all_) for part, all_ in parts.items()}}


def share_besides_passes(result: dict) -> float:
    """Returns the share of a step that is not forward and backward passes."""
    return 1 - result["parts"]["passes"] / sum(result["parts"].values())


def tables(results: list[dict]) -> str:
    header = ["size", "precision", "n", "step, ms", "tokens/s per GPU", "TFLOP/s", *(f"{part}, ms" for part in PARTS)]
    rows = []
    for result in results:
        step = statistics.median(result["milliseconds"])
        rows.append(
            [
                result["size"],
                result["precision"],
                str(result["heads"]),
                output.spread(result["milliseconds"]),
                f"{1e3 * result['tokens'] / step:,.0f}",
                f"{result['flops'] / step / 1e9:.0f}",
                *(f"{result['parts'][part]:.1f}" for part in PARTS),
                f"{share_besides_passes(result):.1%}",
            ]
        )
    return "\n\n".join([output.table([*header, "not in passes"], rows), *filter(None, [verdict(results)])])


def verdict(results: list[dict]) -> str | None:
    """Returns whether little time is spent outside of passes; None if only small models were measured."""
    shares = [share_besides_passes(result) for result in results if result["size"] not in SMALL]
    if not shares:
        return None
    holds = output.holds_or_fails(max(shares) <= MAX_OTHER_SHARE)
    return f"not in passes, 1.3B and larger: at most {max(shares):.1%} of a step <= {MAX_OTHER_SHARE:.0%}: {holds}"


def _draw(results: list[dict]) -> Figure:
    figure, (axes,) = output.figure(9, 4)
    names = [f"{result['size']} {result['precision']}\nn = {result['heads']}" for result in results]
    bottoms = [0.0] * len(results)
    for part in PARTS:
        heights = [result["parts"][part] for result in results]
        axes.bar(names, heights, bottom=bottoms, label=part)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set(ylabel="ms per step")
    axes.legend(frameon=False)
    return figure
