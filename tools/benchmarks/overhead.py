"""Step time of n heads over that of one, forward and backward, on one GPU as a rank of an emulated cluster (paper.md, table S5).

    python tools/benchmark.py overhead --sizes 6.7b --heads 1 4 --bandwidth 100e9 --sms 1 --output results

Variants take turns in one process. "plain" has neither engine nor communication; "hosted / bare" is a variant's n = 1 step over it.
"""

import dataclasses
import gc
import statistics
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks import output, trace, variants
from megamtp.cluster.environment import Place, emulated_place, join_peers
from megamtp.commands.command_line import Parser
from megamtp.config import Config, read_config
from megamtp.model.cost import flops_per_token

CONFIGS = Path(__file__).parents[2] / "configs"
MICRO_BATCHES = {"0.3b": 4, "0.6b": 4, "1.3b": 2, "3b": 2, "6.7b": 2, "13b": 1}


def main(arguments: list[str]) -> None:
    """Raises InputError."""
    parser = Parser(__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(MICRO_BATCHES), choices=MICRO_BATCHES)
    parser.add_argument("--heads", nargs="+", type=int, default=[1, 4], help="numbers of heads, 1 among them [1 4]")
    parser.add_argument("--variants", nargs="+", default=list(variants.NAMES[:4]), choices=variants.NAMES)
    parser.add_argument("--world-size", type=int, default=64, help="ranks emulated [64]")
    parser.add_argument("--bandwidth", default="null", help="bytes/s of a flat network; null (default): NVLink and 400 Gb/s")
    parser.add_argument("--sms", type=int, default=16, help="multiprocessors that communication holds [16]")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each variant [2]")
    parser.add_argument("--steps", type=int, default=5, help="measured steps in a turn [5]")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of ours")
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    results = []
    for size in options.sizes:
        results += _measure_size(size, options)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    settings = {
        "ranks": options.world_size, "bandwidth": options.bandwidth, "SMs held": options.sms, "T": 4096,
        "steps": options.rounds * options.steps,
    }  # fmt: skip
    output.write(options.output, "overhead", settings, results, _table(results, options.heads))
    _draw(results, options.output)


def _config(size: str, heads: int, options) -> Config:
    micro_batch = MICRO_BATCHES[size]
    return read_config([
        str(CONFIGS / f"{size}_n{1 if heads == 1 else 4}.yaml"), f"model.num_future_tokens={heads}",
        "data.train=none", "run.directory=none", f"cluster.emulate={options.world_size}",
        f"cluster.flat_bandwidth={options.bandwidth}", f"cluster.communication_sms={options.sms}",
        f"train.micro_batch_size={micro_batch}", f"train.global_batch_tokens={4096 * micro_batch * options.world_size}",
        *options.set,
    ])  # fmt: skip


def _measure_size(size: str, options) -> list[dict]:
    config = _config(size, options.heads[0], options)
    if not torch.distributed.is_initialized():
        join_peers(emulated_place(Place(0, 0, 1), config.cluster), config.cluster)
    cells = [(name, heads) for heads in options.heads for name in options.variants if heads > 1 or name != "fsdp2 per head"]
    found, kept = variants.measure(
        cells, lambda cell: variants.CLASSES[cell[0]](_config(size, cell[1], options)), options.rounds, options.steps
    )
    results = []
    for (name, heads), measured in found.items():
        result = {
            "size": size, "variant": name, "heads": heads, "micro_batch": MICRO_BATCHES[size],
            "flops": flops_per_token(_config(size, heads, options).model, 4096) * 4096 * MICRO_BATCHES[size],
            **dataclasses.asdict(measured),
        }  # fmt: skip
        if name == "ours":
            variant = kept[name, heads]
            result["exposure"] = {k: dataclasses.asdict(v) for k, v in trace.exposures(variant.forward_and_backward).items()}
            variant.finish()
        results.append(result)
        print(f"{size} n={heads} {name}: {_shown(measured.milliseconds)} ms", result.get("exposure", ""), flush=True)
    return results


def _shown(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} [{min(values):.1f}, {max(values):.1f}]"


def _table(results: list[dict], heads: list[int]) -> str:
    by = {(r["size"], r["variant"], r["heads"]): r for r in results}
    header = ["size", "variant", *(f"n={n}, ms" for n in heads), *(f"n={n} / n=1" for n in heads[1:]), "FLOP ratio"]
    header += ["hosted / bare, n=1", "TFLOP/s, n=1", "peak memory n / 1", "exposed in heads"]
    rows = []
    for size, name in dict.fromkeys((r["size"], r["variant"]) for r in results):
        cells = [by.get((size, name, n)) for n in heads]
        # Per-head backward with one head is one backward.
        one = by.get((size, name, 1)) or by.get((size, "fsdp2 one backward", 1))
        base, bare = (statistics.median(r["milliseconds"]) if r else None for r in (one, by.get((size, "plain", 1))))
        ratios = [f"{statistics.median(c['milliseconds']) / base:.3f}" if c and base else "-" for c in cells[1:]]
        flops = [f"{by[size, name, n]['flops'] / one['flops']:.3f}" for n in heads[1:] if one and (size, name, n) in by]
        last = cells[-1]
        rows.append([
            size, name, *(_shown(c["milliseconds"]) if c else "-" for c in cells), *ratios, " ".join(flops),
            f"{base / bare:.3f}" if base and bare else "-", f"{one['flops'] / base / 1e9:.0f}" if one else "-",
            f"{last['peak_bytes'] / one['peak_bytes']:.3f} of {one['peak_bytes'] / 2**30:.1f} GiB" if last and one else "-",
            _exposed_share(last),
        ])  # fmt: skip
    return output.table(header, rows)


def _exposed_share(result: dict | None) -> str:
    if not result or "exposure" not in result:
        return "-"
    heads = result["exposure"]["heads"]
    return f"{heads['exposed'] / heads['total']:.2%}"


def _draw(results: list[dict], folder: Path) -> None:
    """Step time over the plain one-head step, a group of bars for each size and number of heads."""
    groups = list(dict.fromkeys((r["size"], r["heads"]) for r in results))
    names = list(dict.fromkeys(r["variant"] for r in results))
    plain = {r["size"]: statistics.median(r["milliseconds"]) for r in results if (r["variant"], r["heads"]) == ("plain", 1)}
    figure = Figure(figsize=(2 + 1.6 * len(groups), 4.5), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for index, name in enumerate(names):
        bars = {(r["size"], r["heads"]): r for r in results if r["variant"] == name and r["size"] in plain}
        places = [place for place, group in enumerate(groups) if group in bars]
        heights = [statistics.median(bars[groups[place]]["milliseconds"]) / plain[groups[place][0]] for place in places]
        width = 0.8 / len(names)
        drawn = axes.bar([place + (index - (len(names) - 1) / 2) * width for place in places], heights, width * 0.95, label=name)
        axes.bar_label(drawn, fmt="%.2f", fontsize=7, padding=2)
    axes.set_xticks(range(len(groups)), [f"{size}, n={heads}" for size, heads in groups])
    axes.set_ylabel("step / plain step with one head")
    axes.axhline(1.0, color="0.5", linewidth=0.8)
    axes.set_ylim(bottom=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(names), loc="upper center", bbox_to_anchor=(0.5, 1.12))
    figure.savefig(folder / "overhead.png")
