"""Step time of n heads over that of one, forward and backward, on one GPU as a rank of an emulated cluster (the paper,
table S5).

    %(prog)s --sizes 6.7b --heads 1 4 --output results
    %(prog)s --bandwidth null --sms 16 --name overhead_nodes_16sms --output results
    torchrun --nproc-per-node 2 tools/benchmark.py overhead --sizes 6.7b --rebuild --name nccl    (real ranks)

A size has a process of its own, in which variants take turns. "plain" has neither engine nor communication; "hosted /
bare" is a variant's n = 1 step over it.
"ours fp8" has the losses of all heads in fp8, over the n = 1 step in bf16.
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
from benchmarks.processes import Fresh
from megamtp.config import Config
from megamtp.errors import InputError
from megamtp.model.cost import flops_per_token

TRACED = ("ours", "ours fp8")
SMOKE = emulation.SMOKE | {"sizes": ["0.3b"], "heads": [1, 2], "world_size": 2, "rounds": 1}


def main(arguments: list[str]) -> None:
    """Raises InputError."""
    sizes = list(emulation.MICRO_BATCHES)
    parser = emulation.parser(__doc__, "overhead")
    parser.add_argument("--sizes", nargs="+", default=sizes, choices=sizes)
    parser.add_argument(
        "--heads", nargs="+", type=output.positive, default=[1, 4], help="numbers of heads, 1 first [1 4]"
    )
    parser.add_argument("--variants", nargs="+", default=list(variants.NAMES[:5]), choices=variants.NAMES)
    parser.add_argument("--world-size", type=output.positive, default=64, help="ranks emulated [64]")
    parser.add_argument("--rounds", type=output.positive, default=2, help="turns of each variant [2]")
    parser.add_argument(
        "--rebuild", action="store_true", help="make every variant anew for each turn, where not all fit at once"
    )
    parser.add_argument(
        "--cold", action="store_true", help="also the first step of ours, in a process with empty caches"
    )
    options = output.parse(parser, arguments, SMOKE)
    if options.heads[0] != 1:
        raise InputError(
            f"--heads {' '.join(map(str, options.heads))}; expected 1 first, which the others are divided by"
        )
    ranks, launched = emulation.num_ranks(options.world_size), emulation.num_ranks(1)
    if launched > 1 and (options.cold or len(options.sizes) > 1):
        raise InputError(
            f"several --sizes or --cold under a launcher of {launched} ranks; expected one size, or one process"
        )
    configs = {size: {n: emulation.config(size, n, ranks, options) for n in options.heads} for size in options.sizes}
    output.start(options)
    settings = {
        "ranks": ranks,
        **emulation.settings(configs[options.sizes[0]][1], options),
        "steps": options.rounds * options.steps,
    }
    results: list[dict] = []
    for size, by_heads in configs.items():
        job = size, by_heads, options
        measured = Fresh(_measure_size, *job).result() if launched == 1 else _measure_size(*job)
        if options.cold:
            for result in measured:
                if result["variant"] == "ours":
                    result["first_step_seconds"] = Fresh(_first_step, by_heads[result["heads"]]).result()
        results += measured
        output.write(options, settings, results, tables(results), _draw(results))


def _measure_size(size: str, configs: dict[int, Config], options: argparse.Namespace) -> list[dict]:
    """Of all variants and numbers of heads. Traces come last, for the profiler slows what comes after it."""
    emulation.join(configs[1])
    cells = {
        f"{size} n={n} {name}": (name, n)
        for n in configs
        for name in options.variants
        if n > 1 or name not in variants.ONE_HEAD
    }
    makers = {label: partial(variants.CLASSES[name], configs[n]) for label, (name, n) in cells.items()}
    found = variants.measure(makers, options.rounds, options.steps, keep=not options.rebuild)
    ranks = emulation.num_ranks(options.world_size)
    results = {
        label: {
            "size": size,
            "variant": name,
            "heads": n,
            "micro_batch": configs[n].train.micro_batch_size,
            "flops": flops_per_token(configs[n].model, options.sequence_length)
            * configs[n].train.global_batch_tokens
            / ranks,
            **dataclasses.asdict(found[label]),
        }
        for label, (name, n) in cells.items()
    }
    traced = {label: makers[label] for label, (name, n) in cells.items() if name in TRACED and n == options.heads[-1]}
    for label, trace in variants.traces(traced).items():
        results[label]["exposure"] = trace.exposures()
    return list(results.values())


def _first_step(config: Config) -> float:
    """Seconds of this process's first step, of ours, with nothing compiled before."""
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
    by = {(r["size"], r["variant"], r["heads"]): r for r in results}
    header = ["size", "variant", *(f"n={n}, ms" for n in heads), *(f"n={n} / n=1" for n in heads[1:]), "FLOP ratio"]
    header += ["hosted / bare, n=1", "TFLOP/s, n=1", "peak memory n / 1", "exposed in heads"]
    cold = any("first_step_seconds" in result for result in results)
    header += ["first step, s"] * cold
    rows = []
    for size, name in dict.fromkeys((r["size"], r["variant"]) for r in results):
        cells = [by.get((size, name, n)) for n in heads]
        one = by.get((size, variants.ONE_HEAD.get(name, name), 1))
        base, bare = (statistics.median(r["milliseconds"]) if r else None for r in (one, by.get((size, "plain", 1))))
        ratios = [f"{statistics.median(c['milliseconds']) / base:.3f}" if c and base else "-" for c in cells[1:]]
        flops = [f"{by[size, name, n]['flops'] / one['flops']:.3f}" for n in heads[1:] if one and (size, name, n) in by]
        last = cells[-1]
        rows.append(
            [
                size,
                name,
                *map(_milliseconds, cells),
                *ratios,
                " ".join(flops),
                f"{base / bare:.3f}" if base and bare else "-",
                f"{one['flops'] / base / 1e9:.0f}" if one else "-",
                f"{last['peak_bytes'] / one['peak_bytes']:.3f} of {one['peak_bytes'] / 2**30:.1f} GiB"
                if last and one and one["peak_bytes"]
                else "-",
                _exposed_share(last),
                *[_first_steps(cells)] * cold,
            ]
        )
    return output.table(header, rows)


def _milliseconds(result: dict | None) -> str:
    if not result:
        return "-"
    retries = result.get("allocation_retries", 0)  # older results have none
    return output.spread(result["milliseconds"]) + (f", {retries} times without memory" if retries else "")


def _exposed_share(result: dict | None) -> str:
    if not result or "exposure" not in result:
        return "-"
    heads = result["exposure"]["heads"]
    return f"{heads['exposed'] / heads['total']:.2%}"


def _first_steps(cells: list[dict | None]) -> str:
    """One number for each number of heads."""
    return (
        ", ".join(f"{cell['first_step_seconds']:.1f}" for cell in cells if cell and "first_step_seconds" in cell) or "-"
    )


def _draw(results: list[dict]) -> Figure:
    """Step time over the plain one-head step, or over the first variant's where plain was not measured."""
    groups = list(dict.fromkeys(_group(result) for result in results))
    names = list(dict.fromkeys(result["variant"] for result in results))
    base_name = "plain" if "plain" in names else names[0]
    base = {
        r["size"]: statistics.median(r["milliseconds"]) for r in results if (r["variant"], r["heads"]) == (base_name, 1)
    }
    heights = {
        name: {
            _group(r): statistics.median(r["milliseconds"]) / base[r["size"]] for r in results if r["variant"] == name
        }
        for name in names
    }
    picture, (axes,) = output.figure(2 + 1.6 * len(groups), 4.5)
    output.bars(axes, groups, heights)
    axes.set_ylabel(f"step / {base_name} step with one head")
    axes.axhline(1.0, color="0.5", linewidth=0.8)
    axes.set_ylim(bottom=0.8)
    picture.legend(frameon=False, ncols=min(3, len(names)), loc="outside upper center")
    return picture


def _group(result: dict) -> str:
    return f"{result['size']}, n={result['heads']}"
