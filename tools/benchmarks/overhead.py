"""Measures the step time with n heads, divided by the step time with one head.

    %(prog)s --sizes 6.7b --heads 1 4 --output results
    %(prog)s --bandwidth null --sms 16 --name overhead_nodes_16sms --output results
    torchrun --nproc-per-node 2 tools/benchmark.py overhead --sizes 6.7b --rebuild --name nccl    (real ranks)

A step is forward and backward on one GPU, which is a rank of an emulated cluster. Table S5 of the paper reports this
ratio, too. Each size runs in its own process, which measures the variants alternately. "ours" is megamtp. "plain" is a
bare single-GPU step, without engine and communication. The hosting overhead of a variant is its n = 1 step time divided
by that of "plain". "ours fp8" computes the losses of all heads in fp8; it is compared with the n = 1 step of "ours",
which is in bf16. "all fp8" is train.precision=fp8: it is compared with its own n = 1 step, and with that of "ours".
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from functools import partial

import torch
from matplotlib.figure import Figure

from benchmarks import emulation, output, variants
from benchmarks.processes import ProcessCall
from megamtp.config import Config
from megamtp.errors import InputError
from megamtp.model.cost import flops_per_token

TRACED = ("ours", "ours fp8", "ours all fp8")
SMOKE = emulation.SMOKE | {"sizes": ["0.3b"], "heads": [1, 2], "world_size": 2, "rounds": 1}


def main(arguments: list[str]) -> None:
    """Runs the benchmark. Raises InputError."""
    parser = emulation.parser(__doc__, "overhead")
    parser.add_argument("--sizes", nargs="+", default=emulation.SIZES, choices=emulation.SIZES, help="models [all]")
    parser.add_argument(
        "--heads", nargs="+", type=output.positive, default=[1, 4], help="numbers of heads, 1 first [1 4]"
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        default=[name for name in variants.CLASSES if name != variants.SHIPPED],
        choices=variants.CLASSES,
        help="what to measure [all except deepspeed as shipped]",
    )
    parser.add_argument("--world-size", type=output.positive, default=64, help="emulated ranks [64]")
    parser.add_argument("--rounds", type=output.positive, default=2, help="rounds over all variants [2]")
    parser.add_argument(
        "--rebuild", action="store_true", help="rebuild each variant in each round, if not all fit in memory together"
    )
    parser.add_argument(
        "--cold", action="store_true", help="also measure the first step of the variant ours with empty compile caches"
    )
    options = output.parse(parser, arguments, SMOKE)
    if options.heads[0] != 1:
        raise InputError(f"--heads {' '.join(map(str, options.heads))}; expected 1 first: the others are divided by it")
    num_ranks, num_launched_ranks = emulation.num_ranks(options.world_size), emulation.num_ranks(1)
    if num_launched_ranks > 1 and (options.cold or len(options.sizes) > 1):
        raise InputError(
            f"several --sizes or --cold under a launcher of {num_launched_ranks} ranks; expected one size and no "
            "--cold, or one process"
        )
    configs = {
        size: {n: emulation.config(size, n, num_ranks, options) for n in options.heads} for size in options.sizes
    }
    output.require_gpu(options)
    output.make_folder(options)
    settings = {
        "ranks": num_ranks,
        **emulation.settings(configs[options.sizes[0]][1], options),
        "steps": options.rounds * options.steps,
    }
    results: list[dict] = []
    for size, by_heads in configs.items():
        job = size, by_heads, options
        measured = ProcessCall(_measure_size, *job).run() if num_launched_ranks == 1 else _measure_size(*job)
        if options.cold:
            for result in measured:
                if result["variant"] == "ours":
                    result["first_step_seconds"] = ProcessCall(_first_step, by_heads[result["heads"]]).run()
        results += measured
        # after each size, so that an error in a later size loses no results
        output.write(options, settings, results, tables(results), _draw(results))


def _measure_size(size: str, configs: dict[int, Config], options: argparse.Namespace) -> list[dict]:
    """Returns one result per variant and number of heads.

    Traces are recorded last, because the profiler slows all later steps of the process.
    """
    emulation.join(configs[1])
    cells = {
        f"{size} n={n} {name}": (name, n)
        for n in configs
        for name in options.variants
        if n > 1 or name not in variants.ONE_HEAD
    }
    makers = {label: partial(variants.CLASSES[name], configs[n]) for label, (name, n) in cells.items()}
    measurements = variants.measure(makers, options.rounds, options.steps, keep=not options.rebuild)
    num_ranks = emulation.num_ranks(options.world_size)
    results = {
        label: {
            "size": size,
            "variant": name,
            "heads": n,
            "micro_batch": configs[n].train.micro_batch_size,
            "flops": flops_per_token(configs[n].model, options.sequence_length)
            * configs[n].train.global_batch_tokens
            / num_ranks,
            **dataclasses.asdict(measurements[label]),
        }
        for label, (name, n) in cells.items()
    }
    traced = {label: makers[label] for label, (name, n) in cells.items() if name in TRACED and n == options.heads[-1]}
    for label, trace in variants.traces(traced).items():
        results[label]["exposure"] = trace.exposures()
    return list(results.values())


def _first_step(config: Config) -> float:
    """Returns the seconds of the first step of "ours" in this process, with empty compile caches."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
        emulation.join(config)
        variant = variants.Ours(config)
        torch.cuda.synchronize()
        start = time.perf_counter()
        variant.step()
        torch.cuda.synchronize()
        return time.perf_counter() - start


def tables(results: list[dict]) -> str:
    heads = list(dict.fromkeys(r["heads"] for r in results))
    by_key = {(r["size"], r["variant"], r["heads"]): r for r in results}
    header = ["size", "variant", *(f"n={n}, ms" for n in heads), *(f"n={n} / n=1" for n in heads[1:]), "FLOP ratio"]
    compares_bf16 = any(result["variant"] == "ours all fp8" for result in results)
    header += [f"n={n} / n=1 of ours in bf16" for n in heads[1:]] if compares_bf16 else []
    header += ["hosting overhead, n=1", "TFLOP/s, n=1", f"peak memory n={heads[-1]} / n=1", "exposed in head phase"]
    is_cold = any("first_step_seconds" in result for result in results)
    header += ["first step, s"] if is_cold else []
    rows = []
    for size, name in dict.fromkeys((r["size"], r["variant"]) for r in results):
        cells = [by_key.get((size, name, n)) for n in heads]
        one_head = by_key.get((size, variants.ONE_HEAD.get(name, name), 1))
        plain = by_key.get((size, variants.PLAIN.get(name, "plain"), 1))
        bases = one_head, plain, by_key.get((size, "ours", 1))
        one_head_ms, plain_ms, bf16_ms = (statistics.median(r["milliseconds"]) if r else None for r in bases)
        ratios = _ratios(cells[1:], one_head_ms)
        bf16_ratios = _ratios(cells[1:], bf16_ms if name == "ours all fp8" else None) if compares_bf16 else []
        flops = [
            f"{by_key[size, name, n]['flops'] / one_head['flops']:.3f}"
            for n in heads[1:]
            if one_head and (size, name, n) in by_key
        ]
        last = cells[-1]
        rows.append(
            [
                size,
                name,
                *map(_milliseconds, cells),
                *ratios,
                " ".join(flops),
                *bf16_ratios,
                f"{one_head_ms / plain_ms:.3f}" if one_head_ms and plain_ms else "-",
                f"{one_head['flops'] / one_head_ms / 1e9:.0f}" if one_head else "-",
                f"{last['peak_bytes'] / one_head['peak_bytes']:.3f} of {one_head['peak_bytes'] / 2**30:.1f} GiB"
                if last and one_head and one_head["peak_bytes"]
                else "-",
                _exposed_share(last),
                *([_first_steps(cells)] if is_cold else []),
            ]
        )
    return output.table(header, rows)


def _ratios(cells: list[dict | None], base_ms: float | None) -> list[str]:
    return [f"{statistics.median(c['milliseconds']) / base_ms:.3f}" if c and base_ms else "-" for c in cells]


def _milliseconds(result: dict | None) -> str:
    if not result:
        return "-"
    retries = result.get("allocation_retries", 0)  # older result files lack it
    return output.spread(result["milliseconds"]) + (f", {retries} allocation retries" if retries else "")


def _exposed_share(result: dict | None) -> str:
    if not result or "exposure" not in result:
        return "-"
    heads = result["exposure"]["heads"]
    return f"{heads['exposed'] / heads['total']:.2%}"


def _first_steps(cells: list[dict | None]) -> str:
    """Returns the seconds of the first step for each number of heads."""
    return (
        ", ".join(f"{cell['first_step_seconds']:.1f}" for cell in cells if cell and "first_step_seconds" in cell) or "-"
    )


def _draw(results: list[dict]) -> Figure:
    """Draws step times divided by the one-head step time of "plain" or, if that is missing, of the first variant."""
    groups = list(dict.fromkeys(_group(result) for result in results))
    names = list(dict.fromkeys(result["variant"] for result in results))
    base_name = "plain" if "plain" in names else names[0]
    base_ms = {
        r["size"]: statistics.median(r["milliseconds"]) for r in results if (r["variant"], r["heads"]) == (base_name, 1)
    }
    heights = {
        name: {
            _group(r): statistics.median(r["milliseconds"]) / base_ms[r["size"]]
            for r in results
            if r["variant"] == name
        }
        for name in names
    }
    figure, (axes,) = output.figure(2 + 1.6 * len(groups), 4.5)
    output.bars(axes, groups, heights)
    axes.set_ylabel(f"step time / one-head step time of {base_name}")
    axes.axhline(1.0, color="0.5", linewidth=0.8)
    lowest = min(height for by_group in heights.values() for height in by_group.values())
    axes.set_ylim(bottom=0.8 if lowest > 0.8 else 0.0)
    figure.legend(frameon=False, ncols=min(3, len(names)), loc="outside upper center")
    return figure


def _group(result: dict) -> str:
    return f"{result['size']}, n={result['heads']}"
