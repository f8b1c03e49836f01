"""A pipeline's step on real ranks, beside what `pipeline` predicted for it from one GPU.

    python tools/benchmark.py pipeline --sizes 1.3b --stages 2 --pipelines 1 --name pipeline_p2 --output results
    torchrun --nproc-per-node 2 tools/benchmark.py real_pipeline --predicted results/pipeline_p2.json --output results

Of every plan there whose stages and pipelines are as many as the ranks; give `pipeline` the --link-bandwidth and
--latency that `links` measures. A step counts from its start to the last pass of the slowest rank: the optimizer, which
is not predicted, is left out. On GPUs a profiled step tells how much of it each stage computes: its bubble and
imbalance.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.figure import Figure

from benchmarks import exposure, output, pipeline, plans, variants
from benchmarks.device import synchronize
from megamtp.cluster.environment import find_place, of_all_ranks
from megamtp.config import ClusterConfig, Config
from megamtp.data.loader import Batch
from megamtp.engines.build import build_engine
from megamtp.engines.deepspeed.join import join_peers
from megamtp.engines.pipeline import PipelineEngine
from megamtp.errors import InputError
from megamtp.planning.partition import imbalance

WARM_UP = 2  # steps that do not count: the first ones compile
MOST_WRONG = 0.1
SMOKE = {"steps": 2}


def main(arguments: list[str]) -> None:
    """Raises InputError."""
    parser = output.parser(__doc__, "real_pipeline")
    parser.add_argument("--predicted", type=Path, required=True, metavar="JSON", help="what `pipeline` has written")
    parser.add_argument("--heads", nargs="+", type=output.positive, help="of the plans that are run [all there]")
    parser.add_argument("--steps", type=output.positive, default=5, help="measured steps [5]")
    options = output.parse(parser, arguments, SMOKE)
    settings, predictions = _read(options.predicted)
    place = find_place()
    predictions = [found for found in predictions if not options.heads or found["heads"] in options.heads]
    chosen = [found for found in predictions if found["stages"] * settings["pipelines"] == place.world_size]
    if place.world_size == 1 or not chosen:
        sizes = sorted({found["stages"] * settings["pipelines"] for found in predictions})
        raise InputError(
            f"{place.world_size} ranks; expected as many as a plan in {options.predicted} has, {sizes}: use torchrun"
        )
    output.start(options)
    join_peers(place, ClusterConfig())
    results = [found | {"seconds": measured(found, settings, options)} for found in chosen]
    if torch.cuda.is_available():  # last, for the profiler slows what comes after it
        results = [found | computed(found, settings) for found in results]
    used = {name: settings[name] for name in ("micro-batches", "T", "pipelines", "link", "latency")}
    output.write(options, used | {"steps": options.steps}, results, tables(results), _draw(results))


def _read(path: Path) -> tuple[dict, list[dict]]:
    try:
        content = json.loads(path.read_text())
        for found in content["results"]:
            found["planned_step"] = found.pop("step_seconds")
        return content["settings"], content["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--predicted {path} cannot be read ({error!r}); expected the JSON file of `pipeline`"
        ) from None


def measured(predicted: dict, settings: dict, options: argparse.Namespace) -> list[float]:
    """Seconds of a plan's steps. Collective; every rank has the result."""
    seconds = _run(predicted, settings, lambda run: [run.step() for _ in range(options.steps)])
    output.say(
        f"{predicted['size']} n={predicted['heads']} {predicted['plan']}: {output.spread([1e3 * s for s in seconds])} "
        "ms"
    )
    return seconds


def computed(result: dict, settings: dict) -> dict:
    """How long each rank computes in a plan's step, and what follows for its bubble and imbalance. Collective, as
    above.
    """
    computing = of_all_ranks(_run(result, settings, Run.computing_seconds))
    pipelines, step = settings["pipelines"], statistics.median(result["seconds"])
    firsts = range(0, len(computing), pipelines)  # ranks of one stage follow each other
    by_stage = [statistics.mean(computing[first : first + pipelines]) for first in firsts]
    bubble = 1 - statistics.mean(by_stage) / step
    return {"computing_seconds": computing, "real_bubble": bubble, "real_imbalance": imbalance(by_stage)}


def _run(predicted: dict, settings: dict, use: Callable[["Run"], Any]) -> Any:
    """What `use` makes of a plan's engine, which is made for it, compiled, and then freed."""
    others = set(variants.storages())
    run = Run(_config(predicted, settings))
    for _ in range(WARM_UP):
        run.step()
    found = use(run)
    del run
    variants.free(others)
    return found


def _config(predicted: dict, settings: dict) -> Config:
    config = pipeline.config_of(
        predicted["size"],
        predicted["vocabulary"],
        predicted["stages"],
        predicted["heads"],
        settings["T"],
        settings["micro-batches"],
        settings["pipelines"],
        *settings.get("set", "").split(),
    )
    spread = predicted["plan"] == plans.SPREAD
    return dataclasses.replace(
        config, engine=dataclasses.replace(config.engine, stage_layers=predicted["layers"], spread_losses=spread)
    )


class Run:
    """The engine with micro-batches of random tokens."""

    def __init__(self, config: Config):
        engine, n, train = build_engine(config), config.model.num_future_tokens, config.train
        assert isinstance(engine, PipelineEngine)
        self.engine = engine
        self.device = self.engine.device
        tokens = torch.randint(config.model.vocab_size, (1, train.sequence_length + n), device=self.device)
        dist.broadcast(tokens, src=0)  # a pipeline's stages read the same batches
        targets = tokens[:, 1:].unfold(1, train.sequence_length, 1).permute(1, 0, 2)
        batch = Batch(tokens[:, : train.sequence_length].contiguous(), targets)
        self.micro_batches = [batch] * config.num_micro_batches(self.engine.data_parallel_size)
        self.counts = [config.train.global_batch_tokens] * n
        deepspeed_engine = engine.deepspeed_engine
        self._take_step, deepspeed_engine._take_model_step = deepspeed_engine._take_model_step, self._end_of_passes
        self.end = 0.0

    def step(self) -> float:
        """Seconds to the last pass of the slowest rank. Collective."""
        dist.barrier()
        start = self._now()
        result = self.engine.train_batch(self.micro_batches, self.counts, lr=1e-5)
        if not torch.isfinite(torch.tensor(result.gradient_norm)):
            raise RuntimeError(f"the gradient's norm is {result.gradient_norm}")
        return max(of_all_ranks(self.end - start))

    def computing_seconds(self) -> float:
        """In which this rank's card computed, in one step's passes: the last step, for it is not taken. Collective."""
        self._take_step = lambda lr_kwargs: None
        trace = exposure.record(lambda: self.engine.train_batch(self.micro_batches, self.counts, lr=1e-5))
        return trace.exposure("step").computing / 1e3

    def _end_of_passes(self, lr_kwargs: Any) -> None:
        self.end = self._now()
        self._take_step(lr_kwargs)

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


def _ratio(result: dict) -> float:
    """Predicted over measured."""
    return result["planned_step"] / statistics.median(result["seconds"])


def tables(results: list[dict]) -> str:
    return f"{_table(results)}\n\n{_verdict(results)}"


def _table(results: list[dict]) -> str:
    header = ["size", "V", "stages", "n", "plan", "step, ms", "predicted, ms", "predicted / measured"]
    header += ["bubble, predicted", "slowest / mean, predicted"]
    rows = []
    for result in results:
        bubble, slowest = (
            f"{shown.format(result[name]) if name in result else '-'}, {shown.format(result[planned])}"
            for name, planned, shown in (("real_bubble", "bubble", "{:.1%}"), ("real_imbalance", "imbalance", "{:.3f}"))
        )
        rows.append(
            [
                result["size"],
                str(result["vocabulary"]),
                str(result["stages"]),
                str(result["heads"]),
                result["plan"],
                output.spread([1e3 * seconds for seconds in result["seconds"]]),
                f"{1e3 * result['planned_step']:.1f}",
                f"{_ratio(result):.3f}",
                bubble,
                slowest,
            ]
        )
    return output.table(header, rows)


def _verdict(results: list[dict]) -> str:
    worst = max(abs(_ratio(result) - 1) for result in results)
    return (
        f"predicted step off by {worst:.1%} at most <= {MOST_WRONG:.0%}: {'holds' if worst <= MOST_WRONG else 'FAILS'}"
    )


def _draw(results: list[dict]) -> Figure:
    groups = [
        f"{result['size']}, n={result['heads']}, V={result['vocabulary']}\n{result['plan']}" for result in results
    ]
    picture, (axes,) = output.figure(2 + 1.4 * len(groups), 4.5)
    heights = {
        "measured": {
            group: statistics.median(result["seconds"]) for group, result in zip(groups, results, strict=True)
        },
        "predicted": {group: result["planned_step"] for group, result in zip(groups, results, strict=True)},
    }
    output.bars(axes, groups, heights)
    axes.tick_params("x", labelsize=7)
    axes.set_ylabel("seconds of a step")
    axes.legend(frameon=False)
    return picture
