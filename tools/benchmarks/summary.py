"""Makes the first tables of tools/results/README.md: step time with four heads divided by step time with one head."""

import statistics

from benchmarks import output

HEADS = 4
# label: (step, step by which its time is divided), each as (variant, heads)
RATIOS = {
    "**megamtp**": (("ours", HEADS), ("ours", 1)),
    "**megamtp**, losses in fp8, divided by n = 1 in bf16": (("ours fp8", HEADS), ("ours", 1)),
    "FSDP2, one backward pass": (("fsdp2 one backward", HEADS), ("fsdp2 one backward", 1)),
    "FSDP2, one backward pass per head": (("fsdp2 per head", HEADS), ("fsdp2 one backward", 1)),
    "bare single-GPU step": (("plain", HEADS), ("plain", 1)),
}
HOSTING = {
    "hosting overhead: n = 1 step / bare single-GPU step, megamtp": (("ours", 1), ("plain", 1)),
    "hosting overhead: n = 1 step / bare single-GPU step, FSDP2": (("fsdp2 one backward", 1), ("plain", 1)),
}


def table(results: list[dict], paper: list[dict]) -> str:
    """Returns a table with a column for each size in results of `overhead`. `paper` has the ratios of the paper."""
    sizes = list(dict.fromkeys(result["size"] for result in results))
    steps = {(r["size"], r["variant"], r["heads"]): r for r in results}
    published = {(ratio["size"], ratio["heads"]): ratio["ratio"] for ratio in paper}

    def row(label: str, step: tuple[str, int], base: tuple[str, int]) -> list[str]:
        pairs = [(steps.get((size, *step)), steps.get((size, *base))) for size in sizes]
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
