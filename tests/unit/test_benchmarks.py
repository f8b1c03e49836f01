"""The benchmarks' command line, tables and pictures, on invented measurements; what they measure needs a GPU."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, create_autospec

import pytest
import torch
from benchmarks import (
    corpora,
    data,
    emulation,
    exposure,
    links,
    loss,
    output,
    overhead,
    pipeline,
    prediction,
    processes,
    trace,
    variants,
    world,
)

from megamtp.cluster.network import Network
from megamtp.config import ClusterConfig
from megamtp.data.indexed_dataset import IndexedDataset
from megamtp.errors import InputError

ROOT = Path(__file__).parents[2]

MEASURED = {"ours": 150.0, "fsdp2 one backward": 190.0, "deepspeed as shipped": 250.0}


def options(folder: Path, *arguments: str) -> argparse.Namespace:
    return emulation.parser("", "invented").parse_args(["--output", str(folder), *arguments])


def rows(table: str) -> list[list[str]]:
    """A Markdown table's cells, header first, without the line below it."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    return [cells[0], *cells[2:]]


@pytest.mark.skipif(output.torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("name", ["overhead", "world", "trace", "loss", "pipeline"])
def test_without_a_gpu_every_benchmark_is_one_line_and_status_2(name, tmp_path):
    command = [sys.executable, "tools/benchmark.py", name, "--output", str(tmp_path / "results")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stderr == "megamtp: error: no GPU; expected one: benchmarks measure a GPU's time\n"
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (overhead, ["--sizes", "7b"], "invalid choice: '7b'.*see .*overhead --help"),
        (overhead, ["--heads", "4", "1"], "--heads 4 1; expected 1 first"),
        (overhead, ["--heads", "1", "18", "--sizes", "0.3b"], "num_future_tokens=18 .*expected fewer"),
        (overhead, ["--set", "engine.head_schedule=deferred"], "head_schedule=deferred; expected sequential"),
        (world, ["--world-sizes", "8", "0"], "--world-sizes: 0; expected a whole number, 1 or more"),
        (world, ["--world-sizes", "8", "many"], "--world-sizes: many; expected a whole number"),
        (
            world,
            ["--variants", "deepspeed as shipped", "--shipped-at", "8"],
            "nothing to measure at 16 ranks; expected",
        ),
        (world, ["--bandwidth", "fast"], "flat_bandwidth=fast"),
        (trace, ["--world-size", "-4"], "--world-size: -4; expected"),
        (trace, ["--sms", "0"], "communication_sms=0; expected at least 1"),
        (trace, ["--limit", "low"], "--limit: invalid float value"),
        (loss, ["--rows", "1.5"], "--rows: 1.5; expected"),
        (pipeline, ["--heads", "4", "1"], "--heads 4 1; expected 1 first"),
        (pipeline, ["--stages", "33"], "engine.num_stages=33 with model.num_layers=32; expected no more stages"),
        (pipeline, ["--link-bandwidth", "0"], "--link-bandwidth 0 --latency 2e-05; expected bytes/s above 0"),
        (data, ["--sizes", "1e9", "1e14"], r"--sizes 1e\+14; expected 1e5 to 1e13 tokens"),
        (data, ["--read-tokens", "nan"], "--read-tokens nan; expected"),
        (links, [], "one process; expected several ranks"),
    ],
)
def test_bad_arguments_are_named_before_a_gpu_is_looked_for(module, arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        module.main(arguments)
    assert "\n" not in str(caught.value)


def test_a_launchers_ranks_are_real(tmp_path, monkeypatch):
    """No emulation, one table, and no benchmark that one process must make."""
    monkeypatch.setattr(os, "environ", os.environ | {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4"})
    given = options(tmp_path)
    found = emulation.config("1.3b", 4, emulation.num_ranks(64), given)
    assert found.cluster.emulate is None and found.train.global_batch_tokens == 4 * 2 * 4096
    assert emulation.settings(found, given) == {"network": "NCCL", "T": 4096, "micro-batches": 1}
    output.write(given, {}, [], "table", output.figure(2, 2)[0])
    assert not list(tmp_path.iterdir())  # rank 0 writes
    for module, arguments in ((world, []), (overhead, ["--sizes", "0.3b", "--cold"]), (overhead, [])):
        with pytest.raises(
            InputError, match=r"under a launcher of 4 ranks; expected one (process: |size, or one process$)"
        ):
            module.main(arguments)


def test_links_are_found_again():
    """Latency and bandwidth from the times that an emulated network of them would take."""
    efficiency = {"reduce_scatter": 0.9, "all_reduce": 1.25}
    cluster = ClusterConfig(emulate=2, latency=30e-6, flat_bandwidth=150e9, efficiency=efficiency)
    network = Network(cluster)
    times = {kind: {size: network.seconds(kind, size) for size in links.SIZES} for kind in links.KINDS}
    fitted = links.fit(times, world_size=2).cluster
    assert fitted.latency == pytest.approx(30e-6, rel=1e-3)
    assert fitted.flat_bandwidth == pytest.approx(150e9, rel=1e-3)
    assert fitted.efficiency == pytest.approx(efficiency, rel=1e-3)


def test_collectives_are_timed_after_a_head_start_on_the_card(monkeypatch):
    """The kernels are stand-ins with the real ones' signatures."""
    mark, hold, call = create_autospec(links.mark, side_effect=lambda time: time), create_autospec(links.hold), Mock()
    zeros = torch.zeros
    monkeypatch.setattr(links, "mark", mark)
    monkeypatch.setattr(links, "hold", hold)
    monkeypatch.setattr(links, "_collective", Mock(return_value=call))
    monkeypatch.setattr(links.dist, "barrier", Mock())
    monkeypatch.setattr(links.torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))
    monkeypatch.setattr(links, "find_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(links, "record_time", Mock(side_effect=[0.0, 20e-3] * 3))
    monkeypatch.setattr(links, "synchronize", create_autospec(links.synchronize))
    assert links._seconds("all_gather", 4096, rounds=3) == pytest.approx(20e-3 / links.REPEATS)
    assert call.call_count == 3 + 3 * links.REPEATS
    (time,), _ = mark.call_args
    assert (time.shape, time.dtype) == ((1,), torch.int64)
    hold.assert_called_with(time, links.HEAD_START, num_sms=1)


def test_emulated_steps_beside_real_ones(tmp_path, monkeypatch):
    def written(name: str, ranks: int, milliseconds: list[float]) -> str:
        results = [{"size": "1.3b", "heads": 1, "variant": "ours", "milliseconds": [each]} for each in milliseconds]
        results = [result | {"heads": heads} for heads, result in enumerate(results, start=1)]
        circumstances = {"card": "some card", "date": "2026-11-25"}
        (tmp_path / name).write_text(
            json.dumps({"settings": {"ranks": ranks}, "circumstances": circumstances, "results": results})
        )
        return str(tmp_path / name)

    real, near, far = (
        written("real", 2, [100.0, 200.0]),
        written("near", 2, [109.0, 190.0]),
        written("far", 2, [111.0, 190.0]),
    )
    monkeypatch.setattr("sys.argv", ["benchmark.py", "prediction"])
    for emulated, verdict in (
        (near, "in 2 of 2 rows, 9.0% at most: holds"),
        (far, "in 1 of 2 rows, 11.0% at most: FAILS"),
    ):
        prediction.main(["--measured", real, "--emulated", emulated, "--output", str(tmp_path)])
        assert verdict in (tmp_path / "prediction.md").read_text()
    with pytest.raises(InputError, match="has other sizes, heads, variants or ranks than"):
        prediction.main(["--measured", real, "--emulated", written("others", 4, [100.0, 200.0])])
    with pytest.raises(InputError, match=r"nowhere cannot be read .*; expected the JSON file of `overhead`"):
        prediction.main(["--measured", real, "--emulated", str(tmp_path / "nowhere")])


def test_a_file_in_place_of_the_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(output.torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match=r"--output .*file: File exists; expected a folder"):
        output.start(options(tmp_path / "file"))


def test_settings_tell_the_network(tmp_path):
    """What test_plan.py gives back to the planner, and nothing that was not set."""
    flat = options(tmp_path)
    assert emulation.settings(emulation.config("1.3b", 4, 512, flat), flat) == {
        "bandwidth": "1e+11",
        "latency": "2e-05",
        "SMs held": 1,
        "T": 4096,
        "micro-batches": 1,
    }
    nodes = options(
        tmp_path, "--bandwidth", "null", "--sms", "16", "--micro-batches", "3", "--set", "cluster.latency=0"
    )
    config = emulation.config("0.3b", 1, 64, nodes)
    assert (config.cluster.emulate, config.global_batch_windows, config.cluster.latency) == (64, 64 * 4 * 3, 0.0)
    assert emulation.settings(config, nodes) == {
        "bandwidth": "null",
        "in nodes": "3.6e+11",
        "between nodes": "5e+10",
        "latency": "0",
        "SMs held": 16,
        "T": 4096,
        "micro-batches": 3,
        "set": "cluster.latency=0",
    }


def test_all_three_files_are_called_as_asked(tmp_path, capsys):
    picture, (axes,) = output.figure(4, 3)
    output.bars(axes, ["a", "b"], {"one": {"a": 1.0, "b": 2.0}, "other": {"b": 3.0}})
    assert [round(bar.get_height()) for bar in axes.patches] == [1, 2, 3]
    output.write(options(tmp_path, "--name", "sms16"), {"SMs held": 16}, [{"n": 1}], "the table", picture)
    assert {path.name for path in tmp_path.iterdir()} == {"sms16.md", "sms16.json", "sms16.png"}
    assert json.loads((tmp_path / "sms16.json").read_text())["settings"] == {"SMs held": 16}
    assert (tmp_path / "sms16.md").read_text() in capsys.readouterr().out


def test_a_fresh_process_answers_or_says_how_it_ended():
    first, second = processes.Fresh(os.getpid), processes.Fresh(os.getpid)
    assert len({first.result(), second.result(), os.getpid()}) == 3
    with pytest.raises(InputError, match="no GPU"):
        processes.Fresh(output.start, argparse.Namespace(smoke=False)).result()
    for failing in (processes.Fresh(math.sqrt, -1), processes.Fresh(os._exit, 1)):
        with pytest.raises(RuntimeError, match="ended with status 1"):
            failing.result()


def test_world_goes_up_and_down_and_divides_by_the_first(tmp_path, monkeypatch):
    """A step as long as it was given, and longer by the number of times that its process was made."""
    made = []

    class Invented:
        def __init__(self, function, config, names, num_steps):
            made.append(config.cluster.emulate)
            slower = {"deepspeed as shipped": config.cluster.emulate / 8}
            self.answer = {name: [MEASURED[name] * slower.get(name, 1.0) + len(made)] * num_steps for name in names}

        def result(self):
            return self.answer

    monkeypatch.setattr(world, "Fresh", Invented)
    monkeypatch.setattr(output, "start", lambda options: None)
    world.main(["--world-sizes", "8", "64", "512", "--output", str(tmp_path), "--steps", "3"])
    assert made == [8, 64, 512, 512, 64, 8]
    header, *found = rows((tmp_path / "world.md").read_text())
    assert header[1:3] == ["ours, ms", "over 8 ranks"]
    assert [row[0] for row in found] == ["8", "64", "512"]
    assert [row[1] for row in found] == ["153.5 [151.0, 156.0]", "153.5 [152.0, 155.0]", "153.5 [153.0, 154.0]"]
    assert [row[2] for row in found] == ["1.000"] * 3
    assert [row[6] for row in found] == ["1.000", "-", f"{16003.5 / 253.5:.3f}"]
    assert (tmp_path / "world.png").stat().st_size > 10_000


def invented_trace(exposed: float) -> exposure.Trace:
    """A step of 600 ms, of which 400 to 500 are the head phase, with `exposed` ms of transfers at its beginning."""
    computing, transfers = [], []
    for start in range(0, 600, 10):
        late = exposed if start == 400 else 0.5
        computing.append((start + late, start + 10.0))
        transfers.append((float(start), start + max(late, 5.0)))
    parts = {"step": [(0.0, 600.0)], "heads": [(400.0, 500.0)], "trunk": [(0.0, 400.0), (500.0, 600.0)]}
    return exposure.Trace(computing, transfers, [(400.0, 400.25)], parts)


@pytest.mark.parametrize(("exposed", "status", "word"), [(1.0, 0, "holds"), (8.5, 1, "FAILS")])
def test_trace_tells_whether_the_head_phase_is_exposed(tmp_path, monkeypatch, exposed, status, word):
    class Invented(variants.Variant):
        def __init__(self, config):
            self.prefetches = config.engine.prefetch_modules > 0

        def trace(self, times=3):
            return invented_trace(exposed if self.prefetches else 9.5)

    class InventedPlain(Invented):
        def trace(self, times=3):
            return exposure.Trace([(0.0, 300.0), (302.0, 590.0)], [], [], {"step": [(0.0, 590.0)]})

    def measure(makers, rounds, steps):
        return {name: variants.Measurement([600.0] * steps) for name in makers}

    monkeypatch.setattr(variants, "Ours", Invented)
    monkeypatch.setattr(variants, "Plain", InventedPlain)
    monkeypatch.setattr(variants, "measure", measure)
    monkeypatch.setattr(variants, "traces", lambda makers: {name: make().trace() for name, make in makers.items()})
    monkeypatch.setattr(emulation, "join", lambda config: None)
    monkeypatch.setattr(output, "start", lambda options, smoke_on_cpu: None)
    try:
        trace.main(["--output", str(tmp_path), "--limit", "6"])
        ended = 0
    except SystemExit as end:
        ended = end.code
    assert ended == status
    shown = (tmp_path / "trace.md").read_text()
    share = exposed + 9 * 0.5
    assert f"prefetch as configured: head phase: exposed {share:.2f} % <= 6 %: {word}" in shown
    assert "no prefetch: head phase: exposed 14.00 % <= 6 %: FAILS" in shown
    assert [row[1] for row in rows(shown)[1:]] == [*["step", "head phase", "trunk"] * 2, "step"]
    transferring, long = 9 * 5.0 + max(exposed, 5.0), share  # pieces of half a millisecond count as long
    expected = ["100.0", f"{100 - share:.1f}", f"{transferring:.1f}", f"{share:.2f}", f"{long:.2f}"]
    assert rows(shown)[2][2:10] == [*expected, "0.25", f"{share:.2f}%", "0.00"]
    assert rows(shown)[-1][2:10] == ["590.0", "588.0", "0.0", "0.00", "0.00", "0.00", "0.00%", "2.00"]
    assert json.loads((tmp_path / "trace.json").read_text())["results"][1]["prefetch_modules"] == 0
    assert (tmp_path / "trace.png").stat().st_size > 10_000


def overhead_result(variant: str, heads: int, milliseconds: float, **further) -> dict:
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
        **further,
    }


def test_overhead_shows_ratios_and_first_steps(tmp_path):
    exposed = {"heads": {"total": 100.0, "transferring": 30.0, "exposed": 1.5, "idle": 1.0}}
    results = [
        overhead_result("plain", 1, 600),
        overhead_result("plain", 4, 633, allocation_retries=3),
        overhead_result("ours", 1, 620, exposure=exposed, first_step_seconds=30.0),
        overhead_result("ours", 4, 645, exposure=exposed, first_step_seconds=31.5),
        overhead_result("fsdp2 per head", 4, 900),
    ]
    header, plain, ours, per_head = rows(overhead._table(results, [1, 4]))
    assert header[-1] == "first step, s"
    assert plain[2:6] == ["600.0 [599.0, 602.0]", "633.0 [632.0, 635.0], 3 times without memory", "1.055", "1.054"]
    assert ours[4:] == ["1.040", "1.054", "1.033", "565", "1.000 of 32.0 GiB", "1.50%", "30.0, 31.5"]
    assert (per_head[2], per_head[4], per_head[-2:]) == ("-", "-", ["-", "-"])
    assert len({len(header), len(plain), len(ours), len(per_head)}) == 1
    warm = [{key: value for key, value in result.items() if key != "first_step_seconds"} for result in results]
    assert rows(overhead._table(warm, [1, 4]))[0] == header[:-1]
    overhead._draw(results).savefig(tmp_path / "overhead.png")
    assert (tmp_path / "overhead.png").stat().st_size > 10_000


def test_overhead_has_a_process_for_each_size_and_traces_last_in_it(tmp_path, monkeypatch):
    done, own = [], []

    def fresh(function, *arguments):
        own.append(function.__name__)
        return SimpleNamespace(result=lambda: function(*arguments))

    def first_step(config):
        return 7.0 + config.model.num_future_tokens

    def measure(makers, rounds, steps, keep):
        done.append(("measured", *makers))
        return {name: variants.Measurement([600.0] * rounds * steps, peak_bytes=2**35) for name in makers}

    def traces(makers):
        done.append(("traced", *makers))
        if done[-1][1].startswith("6.7b"):  # what the first size took is safe
            assert len(json.loads((tmp_path / "overhead.json").read_text())["results"]) == 5
        return {name: invented_trace(1.0) for name in makers}

    monkeypatch.setattr(variants, "measure", measure)
    monkeypatch.setattr(variants, "traces", traces)
    monkeypatch.setattr(emulation, "join", lambda config: None)
    monkeypatch.setattr(output, "start", lambda options: None)
    monkeypatch.setattr(overhead, "Fresh", fresh)
    monkeypatch.setattr(overhead, "_first_step", first_step)
    names, cells = ["plain", "ours", "ours fp8"], ["n=1 plain", "n=1 ours", "n=4 plain", "n=4 ours", "n=4 ours fp8"]
    overhead.main(["--sizes", "0.3b", "6.7b", "--variants", *names, "--cold", "--output", str(tmp_path)])
    assert done == [
        (what, *(f"{size} {cell}" for cell in of))
        for size in ("0.3b", "6.7b")
        for what, of in (("measured", cells), ("traced", cells[-2:]))
    ]
    assert own == ["_measure_size", "first_step", "first_step"] * 2
    found = rows((tmp_path / "overhead.md").read_text())[1:]
    assert {(row[0], row[1]): row[-2] for row in found} == {
        (size, name): "-" if name == "plain" else "5.50%" for size in ("0.3b", "6.7b") for name in names
    }
    assert [row[-1] for row in found] == ["-", "8.0, 11.0", "-"] * 2


def test_large_tensors_lose_their_memory(monkeypatch):
    monkeypatch.setattr(variants.torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(
        variants, "storages", lambda: {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    )
    small, large, other = tensors = [torch.ones(size) for size in (10, variants.LARGE // 4, variants.LARGE // 4)]
    variants.free(others={other.data_ptr()})
    assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [40, 0, variants.LARGE]
    assert small.sum() == 10 and other.sum() == variants.LARGE // 4 and large.shape == other.shape


def test_loss_says_in_what_dtype_gradients_are_summed(tmp_path):
    names = ["ours", "liger-kernel", "cut-cross-entropy", loss.PRODUCTS]
    results = [
        {
            "dim": dim,
            "vocabulary": vocabulary,
            "name": name,
            "sum_dtype": "float32" if name == "ours" else "bfloat16",
            "milliseconds": [4.0, 5.0, 6.0 + index],
            "over_floor": 1.2 + index,
            "extra_bytes": None if index == 3 else 2**29,
        }
        for dim, vocabulary in loss.SHAPES
        for index, name in enumerate(names)
    ]
    _, *found = rows(loss._table(results))
    assert len(found) == 12
    assert found[0] == ["2048", "32000", "ours", "float32", "5.00 [4.00, 6.00]", "1.20", "0.50"]
    assert (found[3][3], found[3][-1]) == ("bfloat16", "-")
    loss._draw(results).savefig(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_data_opens_and_reads_what_it_invents(tmp_path, monkeypatch):
    """Both sides, in this process and on small files; the numbers are of no interest."""
    monkeypatch.setattr(
        data, "Fresh", lambda function, *arguments: SimpleNamespace(result=lambda: function(*arguments))
    )
    monkeypatch.setattr(data, "READ_STEPS", 2)
    monkeypatch.setattr(data, "LARGEST_INDEX", 500_000)
    sizes = ["--sizes", "1e5", "1e6", "--megatron-limit", "1e5", "--read-tokens", "1e5"]
    data.main(["--output", str(tmp_path / "results"), "--scratch", str(tmp_path), *sizes])
    results = json.loads((tmp_path / "results/data.json").read_text())["results"]
    opened = [(result["tokens"], result["name"]) for result in results if result["part"] == "opening"]
    assert opened == [(100_000, data.OURS), (100_000, data.FIRST), (100_000, data.AGAIN), (1_000_000, data.OURS)]
    read = {result["name"]: result["tokens_per_second"] for result in results if result["part"] == "reading"}
    assert list(read) == [*data.READERS, "GPTDataset"] and min(read.values()) > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
    assert (tmp_path / "results/data.png").stat().st_size > 10_000
    shown = [row[:2] for row in rows((tmp_path / "results/data.md").read_text())]
    assert shown[:2] == [["tokens", "opened by"], ["1e+05", data.OURS]] and shown[-1][0] == "GPTDataset"


@pytest.mark.parametrize(("write", "lengths"), [(corpora.write_even, [30] * 4), (corpora.write_sparse, [0, 0, 0, 120])])
def test_invented_corpora_are_whole(tmp_path, write, lengths):
    write(tmp_path / "invented", 120, 30 if write is corpora.write_even else 4)
    documents = list(IndexedDataset(tmp_path / "invented"))
    assert [len(document) for document in documents] == lengths
    assert not any(document.any() for document in documents)
