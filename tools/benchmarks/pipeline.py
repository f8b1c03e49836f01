"""Simulates the step of a pipeline with stage times measured on one GPU, and measures the memory of each stage.

    %(prog)s --output results

There are three plans. "naive" gives each stage the same number of layers, and the last stage all heads. "whole layers"
is the best cut between layers. "spread losses" is the best cut if every stage computes the losses of a slice of the
vocabulary. The faster of the last two is the chosen plan, in bold. The simulation includes the passes of the schedule
and the transfers between stages. It leaves out the optimizer and the reduction of gradients over pipelines. Planned
memory is compared without the optimizer's shard, which is not measured.
"""

import argparse
import statistics
import time
from typing import Any

from matplotlib.figure import Figure

from benchmarks import emulation, output, plans, timeline
from benchmarks.device import find_device
from benchmarks.processes import ProcessCall
from megamtp.config import Config, read_config
from megamtp.errors import InputError
from megamtp.model.cost import flops_per_token
from megamtp.planning.links import Link
from megamtp.planning.partition import Stage

SMOKE: dict[str, Any] = {
    "sizes": ["6.7b"],
    "heads": [1, 2],
    "vocabularies": [512],
    "stages": [2],
    "micro_batches": 4,
    "sequence_length": 64,
    "pipelines": 1,
    "measured": 1,
    "set": [*emulation.TINY, "train.precision=fp32"],
}
MAX_IMBALANCE, MAX_OVER_FLOPS, MAX_MEMORY_ERROR = 1.05, 0.02, 0.1
GIB = 2**30


def main(arguments: list[str]) -> None:
    """Runs the benchmark. Raises InputError."""
    parser = output.parser(__doc__, "pipeline")
    parser.add_argument(
        "--sizes", nargs="+", default=["6.7b", "13b"], choices=emulation.SIZES, help="models [6.7b 13b]"
    )
    parser.add_argument(
        "--heads", nargs="+", type=output.positive, default=[1, 4], help="numbers of heads, 1 first [1 4]"
    )
    parser.add_argument(
        "--vocabularies",
        nargs="+",
        type=output.positive,
        default=[32000, 128256],
        help="vocabulary sizes [32000 128256]",
    )
    parser.add_argument("--stages", nargs="+", type=output.positive, default=[4, 8], help="numbers of stages [4 8]")
    parser.add_argument("--micro-batches", type=output.positive, default=32, help="per step and pipeline [32]")
    parser.add_argument(
        "--sequence-length", type=output.positive, default=4096, help="positions of a micro-batch [4096]"
    )
    parser.add_argument(
        "--pipelines",
        type=output.positive,
        default=8,
        help="number of pipelines, over which ZeRO-1 shards the optimizer [8]",
    )
    parser.add_argument("--link-bandwidth", type=float, default=50e9, help="bytes/s between stages [50e9]")
    parser.add_argument("--latency", type=float, default=20e-6, help="latency of a transfer, in seconds [20e-6]")
    parser.add_argument("--measured", type=output.positive, default=6, help="micro-batches measured on each stage [6]")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings")
    options = output.parse(parser, arguments, SMOKE)
    if options.heads[0] != 1:
        raise InputError(f"--heads {' '.join(map(str, options.heads))}; expected 1 first: the others are divided by it")
    if options.link_bandwidth <= 0 or options.latency < 0:
        raise InputError(
            f"--link-bandwidth {options.link_bandwidth:g} --latency {options.latency:g}; expected bytes/s above 0, and "
            "0 s or more"
        )
    for size in options.sizes:
        _configs(size, options)  # raises for invalid options before anything is measured
    output.require_gpu(options)
    output.make_folder(options)
    results = []
    for size in options.sizes:
        results += _results_of_size(size, options)
    if not results:
        raise InputError("nothing was measured, for the reasons above; expected sizes that fit on this card")
    boxes = [result.pop("boxes") for result in results]
    settings = {
        "micro-batches": options.micro_batches,
        "T": options.sequence_length,
        "pipelines": options.pipelines,
        "link": f"{options.link_bandwidth:g} bytes/s",
        "latency": f"{options.latency:g}",
        "measured": options.measured,
        **({"set": " ".join(options.set)} if options.set else {}),
    }
    output.write(options, settings, results, tables(results), _draw(results, boxes))


def _configs(size: str, options: argparse.Namespace) -> dict[tuple[int, int, int], Config]:
    """Returns {(vocabulary, stages, heads): configuration}. Raises InputError."""
    shape = options.sequence_length, options.micro_batches, options.pipelines
    return {
        (vocabulary, num_stages, n): config_of(size, vocabulary, num_stages, n, *shape, *options.set)
        for vocabulary in options.vocabularies
        for num_stages in options.stages
        for n in options.heads
    }


def config_of(
    size: str,
    vocabulary: int,
    num_stages: int,
    heads: int,
    sequence_length: int,
    micro_batches: int,
    pipelines: int,
    *overrides: str,
) -> Config:
    """Returns the configuration of a pipeline with micro-batches of one window. Raises InputError."""
    return read_config(
        [
            *emulation.model_arguments(size, heads),
            "data.train=none",
            "run.directory=none",
            "engine.kind=pipeline",
            f"engine.num_stages={num_stages}",
            f"model.vocab_size={vocabulary}",
            f"train.sequence_length={sequence_length}",
            "train.micro_batch_size=1",
            f"train.global_batch_tokens={sequence_length * micro_batches * pipelines}",
            *overrides,
        ]
    )


def _results_of_size(size: str, options: argparse.Namespace) -> list[dict]:
    """Returns the results of one size, measured in its own process, which frees all its memory at its end.

    If several sizes are measured, an error of one size is printed, and its results are empty.
    """
    start = time.perf_counter()
    try:
        results = ProcessCall(measure_size, size, options).run()
    except (RuntimeError, InputError) as error:
        if len(options.sizes) == 1:
            raise
        print(f"{size}: {error}", flush=True)
        return []
    print(f"{size}: {time.perf_counter() - start:.0f} s in all", flush=True)
    return results


def measure_size(size: str, options: argparse.Namespace) -> list[dict]:
    """Returns one result per configuration and plan.

    Each stage is measured once, with all numbers of micro-batches in flight that any plan needs.
    """
    meter = plans.Meter(find_device(), options.measured)
    link = Link(options.link_bandwidth, options.latency)
    cases = []
    needed: dict[tuple, tuple[Config, Stage, set[int]]] = {}
    for (vocabulary, num_stages, n), config in _configs(size, options).items():
        costs = plans.measured_costs(config, meter)
        for plan_name, plan in plans.make_plans(config, options.pipelines, costs, link).items():
            cases.append((vocabulary, num_stages, n, plan_name, config, plan, costs))
            for index, stage in enumerate(plan.stages):
                _, _, counts = needed.setdefault(plans.stage_key(config, stage), (config, stage, set()))
                counts.add(plans.max_in_flight(plan, index))
    for config, stage, counts in needed.values():
        meter.measure(config, stage, counts)
    results = []
    for vocabulary, num_stages, n, plan_name, config, plan, costs in cases:
        flops = flops_per_token(config.model, config.train.sequence_length)
        result = {
            "size": size,
            "vocabulary": vocabulary,
            "stages": num_stages,
            "heads": n,
            "plan": plan_name,
            "flops": flops,
        }
        results.append(result | plans.simulate_plan(config, plan, costs, link, meter))
    return results


def _by_model(results: list[dict]) -> dict[tuple, dict[str, dict]]:
    """Returns {(size, vocabulary, stages, heads): {plan: result}}."""
    by_model: dict[tuple, dict[str, dict]] = {}
    for result in results:
        by_model.setdefault(tuple(result[key] for key in ("size", "vocabulary", "stages", "heads")), {})[
            result["plan"]
        ] = result
    return by_model


def _chosen(by_plan: dict[str, dict]) -> dict:
    """Returns the fastest plan except for the naive plan."""
    return min(
        (result for name, result in by_plan.items() if name != plans.NAIVE), key=lambda result: result["step_seconds"]
    )


def _ratios(result: dict, models: dict[tuple, dict[str, dict]]) -> tuple[float, float]:
    """Returns (step time / step time of the chosen one-head plan, FLOPs / FLOPs with one head)."""
    one_head = _chosen(models[result["size"], result["vocabulary"], result["stages"], 1])
    return result["step_seconds"] / one_head["step_seconds"], result["flops"] / one_head["flops"]


def _memory_errors(result: dict) -> list[float]:
    """Returns (measured - planned) / planned memory of the stages that were measured."""
    pairs = zip(result["peak_bytes"], result["planned_bytes"], strict=True)
    return [peak / planned - 1 for peak, planned in pairs if peak is not None]


def tables(results: list[dict]) -> str:
    return f"{_table(results)}\n\n{_verdicts(results)}"


def _table(results: list[dict]) -> str:
    header = [
        "size",
        "V",
        "stages",
        "n",
        "plan",
        "step, ms",
        "step / chosen n=1 step",
        "FLOP ratio",
        "bubble",
        "slowest / mean",
    ]
    header += [
        "layers (heads) per stage",
        "ms per micro-batch and stage",
        "GiB per stage, measured/planned",
        "largest stage with optimizer, GiB",
    ]
    models, rows = _by_model(results), []
    for result in results:
        key = tuple(result[name] for name in ("size", "vocabulary", "stages", "heads"))
        bold = "**" if result is _chosen(models[key]) else ""
        ratio, flops = _ratios(result, models)
        layers = zip(result["layers"], result["heads_of_stages"], strict=True)
        memory = zip(result["peak_bytes"], result["planned_bytes"], strict=True)
        needed = (
            optimizer + (planned if peak is None else peak)
            for optimizer, planned, peak in zip(
                result["optimizer_bytes"], result["planned_bytes"], result["peak_bytes"], strict=True
            )
        )
        rows.append(
            [
                *map(str, key),
                f"{bold}{result['plan']}{bold}",
                f"{result['step_seconds'] * 1e3:.0f}",
                f"{ratio:.3f}",
                f"{flops:.3f}",
                f"{result['bubble']:.1%}",
                f"{result['imbalance']:.3f}",
                " ".join(f"{count}({heads})" if heads else str(count) for count, heads in layers),
                " ".join(f"{seconds * 1e3:.1f}" for seconds in result["stage_seconds"]),
                " ".join(
                    f"{'-' if peak is None else f'{peak / GIB:.1f}'}/{planned / GIB:.1f}" for peak, planned in memory
                ),
                f"{max(needed) / GIB:.1f}",
            ]
        )
    return output.table(header, rows)


def _verdicts(results: list[dict]) -> str:
    """Returns a line for each model with several heads, which says if the chosen plan stays within the limits."""
    models, lines = _by_model(results), []
    for (size, vocabulary, num_stages, n), by_plan in models.items():
        if n == 1:
            continue
        chosen = _chosen(by_plan)
        ratio, flops = _ratios(chosen, models)
        errors = [abs(error) for result in by_plan.values() for error in _memory_errors(result)]
        balanced, cheap = chosen["imbalance"] <= MAX_IMBALANCE, ratio <= flops + MAX_OVER_FLOPS
        line = (
            f"- {size}, V={vocabulary}, {num_stages} stages, n={n}, {chosen['plan']}: slowest / mean "
            f"{chosen['imbalance']:.3f} <= "
        )
        line += (
            f"{MAX_IMBALANCE}: {output.holds_or_fails(balanced)}; n={n} / n=1 {ratio:.3f} <= FLOP ratio {flops:.3f} + "
            f"{MAX_OVER_FLOPS}: "
        )
        line += output.holds_or_fails(cheap)
        if errors:
            line += (
                f"; largest memory error {max(errors):.1%}: {output.holds_or_fails(max(errors) <= MAX_MEMORY_ERROR)}"
            )
        lines.append(line)
    ratios = [error + 1 for result in results for error in _memory_errors(result)]
    if ratios:
        shares = f"{min(ratios):.3f} to {max(ratios):.3f}, median {statistics.median(ratios):.3f}"
        lines.append(f"- memory, measured / planned, {len(ratios)} stages of all plans: {shares}")
    return "\n".join(lines)


def _draw(results: list[dict], boxes: list[list[timeline.Box]]) -> Figure:
    """Draws the plans of the first size with the most heads, the largest vocabulary and the most stages."""
    size = results[0]["size"]
    n, vocabulary, num_stages = max((r["heads"], r["vocabulary"], r["stages"]) for r in results if r["size"] == size)
    shown = [
        (result, plan_boxes)
        for result, plan_boxes in zip(results, boxes, strict=True)
        if (result["size"], result["heads"], result["vocabulary"], result["stages"])
        == (size, n, vocabulary, num_stages)
    ]
    end = max(box.end for _, plan_boxes in shown for box in plan_boxes)
    figure, all_axes = output.figure(14, 1.2 + len(shown) * (1.0 + 0.22 * num_stages), rows=len(shown), sharex=True)
    for axes, (result, plan_boxes) in zip(all_axes, shown, strict=True):
        title = f"{result['plan']}: step {result['step_seconds'] * 1e3:.0f} ms, bubble {result['bubble']:.1%}"
        timeline.draw(axes, plan_boxes, num_stages, f"{title}, slowest / mean {result['imbalance']:.3f}", end)
    timeline.legend(figure, {box.label for _, plan_boxes in shown for box in plan_boxes})
    all_axes[-1].set_xlabel("ms")
    figure.suptitle(f"{size}, n={n}, V={vocabulary}")
    return figure
