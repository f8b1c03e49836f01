"""Checks of the files that a smoke run of each benchmark writes."""

import importlib
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

from benchmarks import data, float8, links, loss, prediction, prepare, saving, trace

# benchmarks that read files of another benchmark: (option, other benchmark, path in its folder)
INPUTS = {
    "real_pipeline": ("--predicted", "pipeline", "pipeline.json"),
    "quickstart": ("--run", "learning", "runs/0.3b_seed0/bf16"),
}


def check(name: str, folder: Path, printed: str, on_gpu: bool = False) -> None:
    """Checks both files of a benchmark, its results, and that its tables are printed once."""
    content = json.loads((folder / f"{name}.json").read_text())
    assert content["smoke"] is True
    assert {"card", "torch", "date", "command"} <= content["circumstances"].keys()
    assert content["circumstances"]["card"].startswith("CPU") is not on_gpu
    assert "--smoke" in content["circumstances"]["command"]
    assert content["settings"]
    CHECKS[name](content["results"], on_gpu)
    tables = importlib.import_module(f"benchmarks.{name}").tables(content["results"])
    assert "| --- |" in tables and printed.count(tables) == 1
    assert f"A smoke run: these numbers mean nothing. Its files are in {folder}.\n" in printed
    assert (folder / f"{name}.png").stat().st_size > 10_000


def _overhead(results: list[dict], on_gpu: bool) -> None:
    float8 = ["plain all fp8", "ours all fp8"]
    one = ["plain", "ours", *float8, "fsdp2 one backward"]
    two = ["plain", "ours", "ours fp8", *float8, "fsdp2 one backward"]
    expected = [(1, name) for name in one] + [(2, name) for name in [*two, "fsdp2 per head"]]
    assert [(r["heads"], r["variant"]) for r in results] == expected
    for result in results:
        assert len(result["milliseconds"]) == 2 and min(result["milliseconds"]) > 0
        assert result["flops"] > 0 and (result["peak_bytes"] > 0) is on_gpu
        traced = on_gpu and result["heads"] == 2 and result["variant"].startswith("ours")
        assert ("exposure" in result) is traced
        assert not traced or result["exposure"]["heads"]["total"] > 0


def _world(results: list[dict], on_gpu: bool) -> None:
    expected = [(2, "ours"), (2, "fsdp2 one backward"), (2, "deepspeed as shipped"), (4, "ours")]
    assert [(r["ranks"], r["variant"]) for r in results] == [*expected, (4, "fsdp2 one backward")]
    assert all(len(r["milliseconds"]) == 2 and min(r["milliseconds"]) > 0 for r in results)


def _links(results: list[dict], on_gpu: bool) -> None:
    assert [(r["kind"], r["bytes"]) for r in results] == list(product(links.KINDS, links.SMOKE["sizes"]))
    assert all(result["seconds"] > 0 for result in results)


def _prediction(results: list[dict], on_gpu: bool) -> None:
    _, measured = prediction.read(prediction.SMOKE["measured"])
    assert {(r["size"], r["heads"], r["variant"]): r["measured"] for r in results} == measured


def _trace(results: list[dict], on_gpu: bool) -> None:
    assert [(r["variant"], r["prefetch_modules"] is None) for r in results] == [
        (trace.CONFIGURED, False),
        (trace.NO_PREFETCH, False),
        (trace.PLAIN, True),
    ]
    for result in results:
        parts = ["step"] if result["variant"] == trace.PLAIN else ["step", "heads", "trunk"]
        assert list(result["exposure"]) == parts
        assert all(0 <= part["exposed"] <= part["transferring"] for part in result["exposure"].values())
        assert result["exposure"]["step"]["computing"] > 0


def _layer(results: list[dict], on_gpu: bool) -> None:
    assert [(r["size"], r["precision"]) for r in results] == [("0.3b", "bf16"), ("0.3b", "fp8")]
    for result in results:
        assert min(result["forward_milliseconds"]) > 0 and min(result["milliseconds"]) > 0
        parts = [result[part] for part in ("products", "attention", "traffic")]
        assert min(parts) > 0 and result["floor"] == sum(parts)


def _float8(results: list[dict], on_gpu: bool) -> None:
    errors = {(r["operands"], r["scaling"]): r["output"] for r in results if "scaling" in r}
    assert list(errors) == list(product(float8.DISTRIBUTIONS, float8.SCALINGS))
    assert all(0 < error < 1 for error in errors.values())
    assert any("run" in result for result in results) is on_gpu


def _gradients(results: list[dict], on_gpu: bool) -> None:
    heads = {r["parameter"]: r["fp8 bf16"] for r in results if r["parameter"].startswith("heads")}
    assert len(heads) == 9 and all(len(cosines) == 2 for cosines in heads.values())
    for result in results:
        assert min(result["fp8 fp32"]) > 0.8 and min(result["bf16 fp32"]) > 0.99
    assert min(heads["heads mlp.up.weight"]) < 1 - 1e-5  # fp8 products ran


def _loss(results: list[dict], on_gpu: bool) -> None:
    names = {result["name"] for result in results}
    ours = {"ours", f"ours, one of {loss.HEADS} heads", "ours, 4096 rows"}
    assert {*ours, "logits in memory, fp32", loss.PRODUCTS} <= names
    assert on_gpu or {"ours, fp8", f"ours, fp8, one of {loss.HEADS} heads"} <= names
    assert len(results) == len(names) * len(loss.SMOKE["shapes"])
    for result in results:
        assert min(result["milliseconds"]) > 0 and result["over_floor"] > 0
        assert (result["extra_bytes"] is not None) is (on_gpu and result["name"] != loss.PRODUCTS)


def _pipeline(results: list[dict], on_gpu: bool) -> None:
    plans = ("naive", "whole layers", "spread losses")
    assert [(r["heads"], r["plan"]) for r in results] == list(product((1, 2), plans))
    for result in results:
        assert sum(result["layers"]) == 6 and sum(result["heads_of_stages"]) == result["heads"]
        assert result["step_seconds"] >= 4 * max(result["stage_seconds"])
        assert [peak is not None for peak in result["peak_bytes"]] == [on_gpu] * 2  # not measured on a CPU
        assert 4 >= result["alive"][0] >= result["alive"][1] >= 1
    assert sum(results[-1]["rows"]) == 512


def _real_pipeline(results: list[dict], on_gpu: bool) -> None:
    plans = ("naive", "whole layers", "spread losses")
    assert [(r["heads"], r["plan"]) for r in results] == list(product((1, 2), plans))
    for result in results:
        assert len(result["seconds"]) == 2 and min(result["seconds"]) > 0 and result["planned_step"] > 0
        assert ("computing_seconds" in result) is on_gpu


def _prepare(results: list[dict], on_gpu: bool) -> None:
    assert [result["variant"] for result in results] == [prepare.SENTENCEPIECE, "1 worker", "2 workers"]
    assert all(len(result["seconds"]) == 1 and min(result["cpu_seconds"]) > 0 for result in results)


def _data(results: list[dict], on_gpu: bool) -> None:
    opened, *read = results
    assert (opened["tokens"], opened["name"]) == (100_000, data.OURS) and opened["seconds"] > 0
    names = [result["name"] for result in read]
    assert names in ([*data.READ_VARIANTS], [*data.READ_VARIANTS, "GPTDataset"])
    assert min(result["tokens_per_second"] for result in read) > 1000


def _saving(results: list[dict], on_gpu: bool) -> None:
    checkpoints = [result for result in results if result.get("kind") == "checkpoint"]
    steps = [result for result in results if "saving" in result]
    assert [result["step"] for result in checkpoints] == [4, 8, 9]
    assert [step["number"] for step in steps] == list(range(1 + saving.WARM_UP, 10))
    assert steps[2]["saving"] and steps[2]["still"] > 0 and not steps[0]["saving"]
    assert all(result["copy_seconds"] > 0 and result["wait_seconds"] > 0 for result in checkpoints)
    assert all(result["bytes"] > 12 * 64 * 512 * 2 for result in checkpoints)


def _recovery(results: list[dict], on_gpu: bool) -> None:
    (result,) = results
    steps = [record["step"] for record in result["records"] if record["kind"] == "train"]
    assert steps == list(range(1, 81))
    assert result["killed_rank"] == 0 and result["status"] != 0
    assert 25 <= result["killed_step"] < 80
    assert result["resumed_step"] % 10 == 0 and 10 <= result["resumed_step"] <= result["killed_step"]
    assert result["sample"].startswith("def main(")


def _learning(results: list[dict], on_gpu: bool) -> None:
    assert [(result["variant"], result["head"]) for result in results] == [("bf16", head) for head in (1, 2, 3, 4)]
    for result in results:
        assert len(result["curve"]) == 2 and result["curve"][1] < result["curve"][0]
        assert 0 < result["validation"] < result["curve"][0]


def _quickstart(results: list[dict], on_gpu: bool) -> None:
    assert [result["head"] for result in results] == [1, 2, 3, 4]
    assert all(result["validation"] > 0 and result["unigram_entropy"] > 0 for result in results)


def _train_step(results: list[dict], on_gpu: bool) -> None:
    assert [(r["size"], r["heads"], r["precision"]) for r in results] == [("0.3b", 2, "bf16")]
    (result,) = results
    assert len(result["milliseconds"]) == 2 and result["tokens"] == 64 and result["flops"] > 0
    parts = result["parts"]
    assert 0 < parts["optimizer"] < parts["passes"] < max(result["milliseconds"]) and parts["data"] > 0


CHECKS: dict[str, Callable[[list[dict], bool], None]] = {
    "overhead": _overhead,
    "world": _world,
    "links": _links,
    "prediction": _prediction,
    "trace": _trace,
    "layer": _layer,
    "float8": _float8,
    "gradients": _gradients,
    "loss": _loss,
    "pipeline": _pipeline,
    "real_pipeline": _real_pipeline,
    "prepare": _prepare,
    "data": _data,
    "saving": _saving,
    "recovery": _recovery,
    "learning": _learning,
    "train_step": _train_step,
    "quickstart": _quickstart,
}
