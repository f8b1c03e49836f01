"""Measures the step of a pipeline on real ranks, and compares it with the prediction of `pipeline` from one GPU.

    python tools/benchmark.py pipeline --sizes 1.3b --stages 2 --pipelines 1 --name pipeline_p2 --output results
    torchrun --nproc-per-node 2 tools/benchmark.py real_pipeline --predicted results/pipeline_p2.json --output results

The benchmark runs every plan in --predicted that needs as many ranks as there are. Give `pipeline` the --link-bandwidth
and --latency that `links` measures. The time of a step ends with the last pass of the slowest rank. It excludes the
optimizer, which `pipeline` does not predict. On GPUs, the computing time of each stage in a profiled step gives bubble
and imbalance.
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

WARM_UP = 2  # steps that are not measured: the first steps compile
MAX_ERROR = 0.1
SMOKE = {"steps": 2}


def main(arguments: list[str]) -> None:
    """Runs the benchmark. Raises InputError."""
    parser = output.parser(__doc__, "real_pipeline")
    parser.add_argument("--predicted", type=Path, required=True, metavar="JSON", help="result file of `pipeline`")
    parser.add_argument(
        "--heads", nargs="+", type=output.positive, help="run only the plans with these numbers of heads [all]"
    )
    parser.add_argument("--steps", type=output.positive, default=5, help="measured steps [5]")
    options = output.parse(parser, arguments, SMOKE)
    settings, predictions = _read(options.predicted)
    place = find_place()
    predictions = [
        prediction for prediction in predictions if not options.heads or prediction["heads"] in options.heads
    ]
    chosen = [
        prediction for prediction in predictions if prediction["stages"] * settings["pipelines"] == place.world_size
    ]
    if place.world_size == 1 or not chosen:
        sizes = sorted({prediction["stages"] * settings["pipelines"] for prediction in predictions})
        raise InputError(
            f"{place.world_size} ranks; expected as many as a plan in {options.predicted} has, {sizes}: use torchrun"
        )
    output.require_gpu(options)
    output.make_folder(options)
    join_peers(place, ClusterConfig())
    results = [prediction | {"seconds": step_seconds(prediction, settings, options)} for prediction in chosen]
    if torch.cuda.is_available():  # last, because the profiler slows all later steps
        results = [result | profile(result, settings) for result in results]
    used = {name: settings[name] for name in ("micro-batches", "T", "pipelines", "link", "latency")}
    output.write(options, used | {"steps": options.steps}, results, tables(results), _draw(results))


def _read(path: Path) -> tuple[dict, list[dict]]:
    try:
        content = json.loads(path.read_text())
        for result in content["results"]:
            result["planned_step"] = result.pop("step_seconds")  # "seconds" will be the measured steps
        return content["settings"], content["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--predicted {path} cannot be read ({error!r}); expected the JSON file of `pipeline`"
        ) from None


def step_seconds(predicted: dict, settings: dict, options: argparse.Namespace) -> list[float]:
    """Returns the seconds of each step of a plan, on every rank. Collective."""
    seconds = _with_engine(predicted, settings, lambda engine: [engine.step() for _ in range(options.steps)])
    output.say(
        f"{predicted['size']} n={predicted['heads']} {predicted['plan']}: {output.spread([1e3 * s for s in seconds])} "
        "ms"
    )
    return seconds


def profile(result: dict, settings: dict) -> dict:
    """Returns the computing time of each rank in a step, and the step's bubble and imbalance. Collective."""
    computing = of_all_ranks(_with_engine(result, settings, PlanEngine.computing_seconds))
    pipelines, step = settings["pipelines"], statistics.median(result["seconds"])
    firsts = range(0, len(computing), pipelines)  # the ranks of a stage are consecutive
    by_stage = [statistics.mean(computing[first : first + pipelines]) for first in firsts]
    bubble = 1 - statistics.mean(by_stage) / step
    return {"computing_seconds": computing, "real_bubble": bubble, "real_imbalance": imbalance(by_stage)}


def _with_engine(predicted: dict, settings: dict, measure: Callable[["PlanEngine"], Any]) -> Any:
    """Builds and compiles a plan's engine, returns what `measure` returns for it, and frees the engine."""
    kept_storages = set(variants.storages())
    engine = PlanEngine(_config(predicted, settings))
    for _ in range(WARM_UP):
        engine.step()
    result = measure(engine)
    del engine
    variants.free(kept_storages)
    return result


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
    is_spread = predicted["plan"] == plans.SPREAD
    return dataclasses.replace(
        config, engine=dataclasses.replace(config.engine, stage_layers=predicted["layers"], spread_losses=is_spread)
    )


class PlanEngine:
    """The engine of a plan, and micro-batches of random tokens for it."""

    def __init__(self, config: Config):
        engine, n, train = build_engine(config), config.model.num_future_tokens, config.train
        assert isinstance(engine, PipelineEngine)
        self.engine = engine
        self.device = self.engine.device
        tokens = torch.randint(config.model.vocab_size, (1, train.sequence_length + n), device=self.device)
        dist.broadcast(tokens, src=0)  # a pipeline's stages read the same batches
        batch = Batch.from_tokens(tokens, train.sequence_length)
        self.micro_batches = [batch] * config.num_micro_batches(self.engine.data_parallel_size)
        self.counts = [config.train.global_batch_tokens] * n
        self.end_of_passes = 0.0
        # DeepSpeed runs the optimizer in _take_model_step, after the last pass of a step: the measured time ends there.
        self._take_model_step = engine.deepspeed_engine._take_model_step
        engine.deepspeed_engine._take_model_step = self._record_end_and_step

    def step(self) -> float:
        """Trains one step and returns the seconds to the last pass of the slowest rank. Collective."""
        dist.barrier()
        start = self._now()
        result = self.engine.train_batch(self.micro_batches, self.counts, lr=1e-5)
        if not torch.isfinite(torch.tensor(result.gradient_norm)):
            raise RuntimeError(f"the gradient's norm is {result.gradient_norm}")
        return max(of_all_ranks(self.end_of_passes - start))

    def computing_seconds(self) -> float:
        """Returns the seconds in which this rank's card computes in the passes of one step. Collective.

        Call it last: it switches the optimizer off.
        """
        self._take_model_step = lambda lr_kwargs: None
        trace = exposure.record(lambda: self.engine.train_batch(self.micro_batches, self.counts, lr=1e-5))
        return trace.exposure("step").computing / 1e3

    def _record_end_and_step(self, lr_kwargs: Any) -> None:
        self.end_of_passes = self._now()
        self._take_model_step(lr_kwargs)

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


def _ratio(result: dict) -> float:
    """Returns the predicted divided by the measured step time."""
    return result["planned_step"] / statistics.median(result["seconds"])


def tables(results: list[dict]) -> str:
    return f"{_table(results)}\n\n{_verdict(results)}"


def _table(results: list[dict]) -> str:
    header = ["size", "V", "stages", "n", "plan", "step, ms", "predicted, ms", "predicted / measured"]
    header += ["bubble, predicted bubble", "slowest / mean, predicted"]
    rows = []
    for result in results:
        bubble, slowest = (
            f"{form.format(result[name]) if name in result else '-'}, {form.format(result[predicted_name])}"
            for name, predicted_name, form in (
                ("real_bubble", "bubble", "{:.1%}"),
                ("real_imbalance", "imbalance", "{:.3f}"),
            )
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
    word = output.holds_or_fails(worst <= MAX_ERROR)
    return f"largest error of the predicted step {worst:.1%} <= {MAX_ERROR:.0%}: {word}"


def _draw(results: list[dict]) -> Figure:
    groups = [
        f"{result['size']}, n={result['heads']}, V={result['vocabulary']}\n{result['plan']}" for result in results
    ]
    figure, (axes,) = output.figure(2 + 1.4 * len(groups), 4.5)
    heights = {
        "measured": {
            group: statistics.median(result["seconds"]) for group, result in zip(groups, results, strict=True)
        },
        "predicted": {group: result["planned_step"] for group, result in zip(groups, results, strict=True)},
    }
    output.bars(axes, groups, heights)
    axes.tick_params("x", labelsize=7)
    axes.set_ylabel("seconds per step")
    axes.legend(frameon=False)
    return figure
