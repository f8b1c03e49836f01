"""A pipeline's step, played with the times of its stages as they are on one GPU, and the memory of each stage.

    %(prog)s --output results

Three plans: "naive", equal numbers of layers and all heads last; "whole layers", the best cut; "spread losses", the
best one with losses spread by vocabulary. The fastest is chosen (**). Played are the schedule's passes and transfers
between stages; not the optimizer, and not the reduction over pipelines. Memory is compared without the optimizer's
shard, which is not measured.
"""

import argparse
import statistics
import time
from typing import Any

from matplotlib.figure import Figure

from benchmarks import emulation, output, plans, timeline
from benchmarks.device import find_device
from benchmarks.processes import Fresh
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
MOST_IMBALANCE, MOST_OVER_FLOPS, MOST_MEMORY_ERROR = 1.05, 0.02, 0.1
GIB = 2**30


def main(arguments: list[str]) -> None:
    """Raises InputError."""
    parser = output.parser(__doc__, "pipeline")
    parser.add_argument("--sizes", nargs="+", default=["6.7b", "13b"], choices=emulation.MICRO_BATCHES)
    parser.add_argument(
        "--heads", nargs="+", type=output.positive, default=[1, 4], help="numbers of heads, 1 first [1 4]"
    )
    parser.add_argument(
        "--vocabularies", nargs="+", type=output.positive, default=[32000, 128256], help="[32000 128256]"
    )
    parser.add_argument("--stages", nargs="+", type=output.positive, default=[4, 8], help="[4 8]")
    parser.add_argument("--micro-batches", type=output.positive, default=32, help="of a step in one pipeline [32]")
    parser.add_argument(
        "--sequence-length", type=output.positive, default=4096, help="positions of a micro-batch [4096]"
    )
    parser.add_argument(
        "--pipelines", type=output.positive, default=8, help="among which ZeRO-1 shards the optimizer [8]"
    )
    parser.add_argument("--link-bandwidth", type=float, default=50e9, help="bytes/s between stages [50e9]")
    parser.add_argument(
        "--latency", type=float, default=20e-6, help="seconds of a transfer before its first byte [20e-6]"
    )
    parser.add_argument(
        "--measured", type=output.positive, default=6, help="micro-batches that each stage is timed with [6]"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings")
    options = output.parse(parser, arguments, SMOKE)
    if options.heads[0] != 1:
        raise InputError(
            f"--heads {' '.join(map(str, options.heads))}; expected 1 first, which the others are divided by"
        )
    if options.link_bandwidth <= 0 or options.latency < 0:
        raise InputError(
            f"--link-bandwidth {options.link_bandwidth:g} --latency {options.latency:g}; expected bytes/s above 0, and "
            "0 s or more"
        )
    for size in options.sizes:
        _configs(size, options)  # refuses what cannot be, before anything is measured
    output.start(options)
    results = []
    for size in options.sizes:
        results += _sizes_results(size, options)
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
    """By (vocabulary, stages, heads). Raises InputError."""
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
    *settings: str,
) -> Config:
    """Of a pipeline whose micro-batches are one window. Raises InputError."""
    return read_config(
        [
            *emulation.model(size, heads),
            "data.train=none",
            "run.directory=none",
            "engine.kind=pipeline",
            f"engine.num_stages={num_stages}",
            f"model.vocab_size={vocabulary}",
            f"train.sequence_length={sequence_length}",
            "train.micro_batch_size=1",
            f"train.global_batch_tokens={sequence_length * micro_batches * pipelines}",
            *settings,
        ]
    )


def _sizes_results(size: str, options: argparse.Namespace) -> list[dict]:
    """Of one size, in a process of its own, whose memory ends with it; nothing if that failed, which it has then
    said.
    """
    start = time.perf_counter()
    try:
        results = Fresh(measure_size, size, options).result()
    except (RuntimeError, InputError) as error:
        if len(options.sizes) == 1:
            raise
        print(f"{size}: {error}", flush=True)
        return []
    print(f"{size}: {time.perf_counter() - start:.0f} s in all", flush=True)
    return results


def measure_size(size: str, options: argparse.Namespace) -> list[dict]:
    """A result for each configuration and plan. Stages are first measured with all numbers of micro-batches that
    plans ask for.
    """
    meter = plans.Meter(find_device(), options.measured)
    link = Link(options.link_bandwidth, options.latency)
    cases = []
    wanted: dict[tuple, tuple[Config, Stage, set[int]]] = {}
    for (vocabulary, num_stages, n), config in _configs(size, options).items():
        costs = plans.measured_costs(config, meter)
        for name, plan in plans.make_plans(config, options.pipelines, costs, link).items():
            cases.append((vocabulary, num_stages, n, name, config, plan, costs))
            for index, stage in enumerate(plan.stages):
                _, _, counts = wanted.setdefault(plans.stage_key(config, stage), (config, stage, set()))
                counts.add(plans.alive(plan, index))
    for config, stage, counts in wanted.values():
        meter.measure(config, stage, counts)
    results = []
    for vocabulary, num_stages, n, name, config, plan, costs in cases:
        flops = flops_per_token(config.model, config.train.sequence_length)
        result = {
            "size": size,
            "vocabulary": vocabulary,
            "stages": num_stages,
            "heads": n,
            "plan": name,
            "flops": flops,
        }
        results.append(result | plans.play_plan(config, plan, costs, link, meter))
    return results


def _by_model(results: list[dict]) -> dict[tuple, dict[str, dict]]:
    """{(size, vocabulary, stages, heads): {plan: result}}."""
    found: dict[tuple, dict[str, dict]] = {}
    for result in results:
        found.setdefault(tuple(result[key] for key in ("size", "vocabulary", "stages", "heads")), {})[
            result["plan"]
        ] = result
    return found


def _chosen(by_plan: dict[str, dict]) -> dict:
    """The fastest but the naive one."""
    return min(
        (result for name, result in by_plan.items() if name != plans.NAIVE), key=lambda result: result["step_seconds"]
    )


def _ratios(result: dict, models: dict[tuple, dict[str, dict]]) -> tuple[float, float]:
    """(step over the best one-head step, FLOPs over those of one head)."""
    one = _chosen(models[result["size"], result["vocabulary"], result["stages"], 1])
    return result["step_seconds"] / one["step_seconds"], result["flops"] / one["flops"]


def _memory_errors(result: dict) -> list[float]:
    """Measured over planned, less 1, of the stages that were measured."""
    pairs = zip(result["peak_bytes"], result["planned_bytes"], strict=True)
    return [peak / planned - 1 for peak, planned in pairs if peak is not None]


def tables(results: list[dict]) -> str:
    return f"{_table(results)}\n\n{_verdicts(results)}"


def _table(results: list[dict]) -> str:
    header = ["size", "V", "stages", "n", "plan", "step, ms", "over best n=1", "FLOP ratio", "bubble", "slowest / mean"]
    header += [
        "layers (heads) of stages",
        "ms of stages",
        "GiB of stages, measured / planned",
        "GiB with optimizer, at most",
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
    """For each model with several heads, whether the chosen plan keeps the limits."""
    models, lines = _by_model(results), []
    for key, by_plan in models.items():
        if key[3] == 1:
            continue
        found = _chosen(by_plan)
        ratio, flops = _ratios(found, models)
        errors = [abs(error) for result in by_plan.values() for error in _memory_errors(result)]
        balanced, cheap = found["imbalance"] <= MOST_IMBALANCE, ratio <= flops + MOST_OVER_FLOPS
        line = (
            f"- {key[0]}, V={key[1]}, {key[2]} stages, n={key[3]}, {found['plan']}: slowest / mean "
            f"{found['imbalance']:.3f} <= "
        )
        line += (
            f"{MOST_IMBALANCE}: {_word(balanced)}; n={key[3]} / n=1 {ratio:.3f} <= FLOP ratio {flops:.3f} + "
            f"{MOST_OVER_FLOPS}: "
        )
        line += _word(cheap)
        if errors:
            line += f"; memory off by {max(errors):.1%} at most: {_word(max(errors) <= MOST_MEMORY_ERROR)}"
        lines.append(line)
    every = [error + 1 for result in results for error in _memory_errors(result)]
    if every:
        shares = f"{min(every):.3f} to {max(every):.3f}, median {statistics.median(every):.3f}"
        lines.append(f"- memory, measured over planned, {len(every)} stages of all plans: {shares}")
    return "\n".join(lines)


def _word(holds: bool) -> str:
    return "holds" if holds else "FAILS"


def _draw(results: list[dict], boxes: list[list[timeline.Box]]) -> Figure:
    """The plans of the first size with the most heads, the largest vocabulary and the most stages."""
    wanted = max((r["heads"], r["vocabulary"], r["stages"]) for r in results if r["size"] == results[0]["size"])
    shown = [
        (result, found)
        for result, found in zip(results, boxes, strict=True)
        if (result["size"], result["heads"], result["vocabulary"], result["stages"]) == (results[0]["size"], *wanted)
    ]
    end = max(box.end for _, found in shown for box in found)
    picture, diagrams = output.figure(14, 1.2 + len(shown) * (1.0 + 0.22 * wanted[2]), rows=len(shown), sharex=True)
    for axes, (result, found) in zip(diagrams, shown, strict=True):
        title = f"{result['plan']}: step {result['step_seconds'] * 1e3:.0f} ms, bubble {result['bubble']:.1%}"
        timeline.draw(axes, found, wanted[2], f"{title}, slowest / mean {result['imbalance']:.3f}", end)
    timeline.legend(picture, {box.label for _, found in shown for box in found})
    diagrams[-1].set_xlabel("ms")
    picture.suptitle(f"{results[0]['size']}, n={wanted[0]}, V={wanted[1]}")
    return picture
