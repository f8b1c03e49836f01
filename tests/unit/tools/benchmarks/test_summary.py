"""Step time ratios of the summary, from invented steps."""

from benchmarks import summary


def test_the_summary_divides_medians():
    def step(variant: str, heads: int, milliseconds: float) -> dict:
        times = [milliseconds - 1, milliseconds, milliseconds + 5]
        return {"size": "3b", "variant": variant, "heads": heads, "milliseconds": times, "flops": 10.0 + heads}

    steps = [step("plain", 1, 100), step("ours", 1, 110), step("ours", 4, 121), step("ours fp8", 4, 115.5)]
    steps += [step("fsdp2 one backward", 1, 120), step("fsdp2 per head", 4, 180)]
    lines = summary.table(steps, [{"size": "3b", "heads": 4, "ratio": 1.07}]).splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert header == ["n = 4 / n = 1", "3B"]
    assert [cell for _, cell in rows] == ["1.100", "1.050", "-", "1.500", "-", "1.273", "1.07", "1.100", "1.200"]
