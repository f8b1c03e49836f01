"""The first tables of tools/results/README.md: how much longer a step with four heads takes than a step with one."""

import statistics

from benchmarks import output

HEADS = 4
# which step is divided by which: (variant, heads)
RATIOS = {
    "**megamtp**": (("ours", HEADS), ("ours", 1)),
    "**megamtp**, losses in fp8, over n = 1 in bf16": (("ours fp8", HEADS), ("ours", 1)),
    "FSDP2, one backward pass": (("fsdp2 one backward", HEADS), ("fsdp2 one backward", 1)),
    "FSDP2, one backward pass per head": (("fsdp2 per head", HEADS), ("fsdp2 one backward", 1)),
    "no engine and no network": (("plain", HEADS), ("plain", 1)),
}
HOSTING = {
    "n = 1 over n = 1 without engine and network: megamtp": (("ours", 1), ("plain", 1)),
    "n = 1 over n = 1 without engine and network: FSDP2": (("fsdp2 one backward", 1), ("plain", 1)),
}


def table(results: list[dict], paper: list[dict]) -> str:
    """A column for each size of `overhead`'s results. `paper` has the paper's own ratios."""
    sizes = list(dict.fromkeys(result["size"] for result in results))
    steps = {(r["size"], r["variant"], r["heads"]): r for r in results}
    published = {(ratio["size"], ratio["heads"]): ratio["ratio"] for ratio in paper}

    def row(label: str, own: tuple[str, int], other: tuple[str, int]) -> list[str]:
        pairs = [(steps.get((size, *own)), steps.get((size, *other))) for size in sizes]
        return [label, *(f"{_median(a) / _median(b):.3f}" if a and b else "-" for a, b in pairs)]

    flops = [steps[size, "ours", HEADS]["flops"] / steps[size, "ours", 1]["flops"] for size in sizes]
    return output.table(
        [f"n = {HEADS} / n = 1", *(size.upper() for size in sizes)],
        [
            *(row(label, *pair) for label, pair in RATIOS.items()),
            ["FLOPs", *(f"{ratio:.3f}" for ratio in flops)],
            ["the paper, table S5", *(f"{published[size, HEADS]:.2f}" for size in sizes)],
            *(row(label, *pair) for label, pair in HOSTING.items()),
        ],
    )


def _median(result: dict) -> float:
    return statistics.median(result["milliseconds"])
