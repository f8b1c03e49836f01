"""The table of `overhead` on invented times, and the order of its measurements."""

import json
from types import SimpleNamespace

from benchmarks import emulation, output, overhead, variants

from tests.measurements import invented_trace, rows


def overhead_result(variant: str, heads: int, milliseconds: float, **other_fields) -> dict:
    return {
        "size": "6.7b",
        "variant": variant,
        "heads": heads,
        "micro_batch": 2,
        "flops": 3.5e14 * (1 + 0.018 * (heads - 1)),
        "milliseconds": [milliseconds - 1, milliseconds, milliseconds + 2],
        "kept_bytes": 0,
        "peak_bytes": 2**35,
        "allocation_retries": 0,
        **other_fields,
    }


def test_the_table_shows_ratios_and_first_steps(tmp_path):
    exposed = {"heads": {"total": 100.0, "transferring": 30.0, "exposed": 1.5, "idle": 1.0}}
    results = [
        overhead_result("plain", 1, 600),
        overhead_result("plain", 4, 633, allocation_retries=3),
        overhead_result("ours", 1, 620, exposure=exposed, first_step_seconds=30.0),
        overhead_result("ours", 4, 645, exposure=exposed, first_step_seconds=31.5),
        overhead_result("fsdp2 per head", 4, 900),
    ]
    header, plain, ours, per_head = rows(overhead.tables(results))
    assert header[-1] == "first step, s"
    assert plain[2:6] == ["600.0 [599.0, 602.0]", "633.0 [632.0, 635.0], 3 allocation retries", "1.055", "1.054"]
    assert ours[4:] == ["1.040", "1.054", "1.033", "565", "1.000 of 32.0 GiB", "1.50%", "30.0, 31.5"]
    assert (per_head[2], per_head[4], per_head[-2:]) == ("-", "-", ["-", "-"])
    assert len({len(header), len(plain), len(ours), len(per_head)}) == 1
    warm = [{key: value for key, value in result.items() if key != "first_step_seconds"} for result in results]
    assert rows(overhead.tables(warm))[0] == header[:-1]
    overhead._draw(results).savefig(tmp_path / "overhead.png")
    assert (tmp_path / "overhead.png").stat().st_size > 10_000


def test_each_size_has_a_new_process_that_records_traces_last(tmp_path, monkeypatch):
    events, functions = [], []

    def process_call(function, *arguments):
        functions.append(function.__name__)
        return SimpleNamespace(run=lambda: function(*arguments))

    def first_step(config):
        return 7.0 + config.model.num_future_tokens

    def measure(makers, rounds, steps, keep):
        events.append(("measured", *makers))
        return {name: variants.Measurement([600.0] * rounds * steps, peak_bytes=2**35) for name in makers}

    def traces(makers):
        events.append(("traced", *makers))
        if events[-1][1].startswith("6.7b"):  # the results of the first size are already written
            assert len(json.loads((tmp_path / "overhead.json").read_text())["results"]) == 5
        return {name: invented_trace(1.0) for name in makers}

    monkeypatch.setattr(variants, "measure", measure)
    monkeypatch.setattr(variants, "traces", traces)
    monkeypatch.setattr(emulation, "join", lambda config: None)
    monkeypatch.setattr(output, "require_gpu", lambda options: None)
    monkeypatch.setattr(overhead, "ProcessCall", process_call)
    monkeypatch.setattr(overhead, "_first_step", first_step)
    names, cells = ["plain", "ours", "ours fp8"], ["n=1 plain", "n=1 ours", "n=4 plain", "n=4 ours", "n=4 ours fp8"]
    overhead.main(["--sizes", "0.3b", "6.7b", "--variants", *names, "--cold", "--output", str(tmp_path)])
    assert events == [
        (event, *(f"{size} {cell}" for cell in event_cells))
        for size in ("0.3b", "6.7b")
        for event, event_cells in (("measured", cells), ("traced", cells[-2:]))
    ]
    assert functions == ["_measure_size", "first_step", "first_step"] * 2
    table_rows = rows(overhead.tables(json.loads((tmp_path / "overhead.json").read_text())["results"]))[1:]
    assert {(row[0], row[1]): row[-2] for row in table_rows} == {
        (size, name): "-" if name == "plain" else "5.50%" for size in ("0.3b", "6.7b") for name in names
    }
    assert [row[-1] for row in table_rows] == ["-", "8.0, 11.0", "-"] * 2
