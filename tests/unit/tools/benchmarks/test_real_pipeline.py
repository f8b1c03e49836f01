"""tools/benchmarks/real_pipeline.py on two CPU ranks with a tiny model, and its table on invented times."""

import json
import subprocess
import sys

import pytest
from benchmarks import real_pipeline

from megamtp.cluster.ports import reserve_port
from megamtp.errors import InputError
from tests.end_to_end.jobs import ROOT, environment
from tests.unit.tools.benchmarks.test_pipeline import TINY

PREDICT = [
    "--device",
    "cpu",
    "--sizes",
    "6.7b",
    "--stages",
    "2",
    "--pipelines",
    "1",
    "--vocabularies",
    "300",
    "--heads",
    "1",
    "2",
    "--micro-batches",
    "4",
    "--sequence-length",
    "8",
    "--measured",
    "1",
    "--name",
    "predicted",
]


@pytest.mark.timeout(400)
def test_every_plan_runs_on_its_ranks(tmp_path):
    """Naive, whole layers and spread losses, with one head and two; as predicted or not is of no interest on a CPU."""
    benchmark, folder = "tools/benchmark.py", ["--output", str(tmp_path)]
    call = dict(cwd=ROOT, env=environment(), check=True, capture_output=True, text=True)
    subprocess.run([sys.executable, benchmark, "pipeline", *PREDICT, *folder, "--set", *TINY], **call)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={reserve_port()}", benchmark]
    real = [
        "real_pipeline",
        "--predicted",
        str(tmp_path / "predicted.json"),
        "--device",
        "cpu",
        "--steps",
        "2",
        *folder,
    ]
    printed = subprocess.run([sys.executable, *launcher, *real], **call).stdout
    results = json.loads((tmp_path / "real_pipeline.json").read_text())["results"]
    predicted = json.loads((tmp_path / "predicted.json").read_text())["results"]
    assert [(r["heads"], r["plan"]) for r in results] == [(r["heads"], r["plan"]) for r in predicted]
    assert {result["plan"] for result in results} == {"naive", "whole layers", "spread losses"}
    assert [result["planned_step"] for result in results] == [result["step_seconds"] for result in predicted]
    assert all(len(result["seconds"]) == 2 and min(result["seconds"]) > 0 for result in results)
    assert printed.count("predicted / measured") == 1
    assert (tmp_path / "real_pipeline.png").stat().st_size > 10_000


def test_the_table_and_the_verdict(tmp_path):
    result = {
        "size": "1.3b",
        "vocabulary": 32000,
        "stages": 2,
        "heads": 4,
        "plan": "whole layers",
        "planned_step": 0.95,
        "bubble": 0.05,
        "imbalance": 1.01,
        "seconds": [0.9, 1.0, 1.5],
        "real_bubble": 0.06,
        "real_imbalance": 1.02,
    }
    shown = real_pipeline._table([result]).splitlines()[-1]
    assert (
        shown == "| 1.3b | 32000 | 2 | 4 | whole layers | 1000.0 [900.0, 1500.0] | 950.0 | 0.950 | 6.0%, 5.0% | 1.020, "
        "1.010 |"
    )
    assert real_pipeline._verdict([result]) == "predicted step off by 5.0% at most <= 10%: holds"
    assert real_pipeline._verdict([result, result | {"planned_step": 1.2}]).endswith("20.0% at most <= 10%: FAILS")
    real_pipeline._draw([result]).savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_what_a_profiled_step_tells(monkeypatch):
    """Two stages of two pipelines; a stage's ranks follow each other."""
    monkeypatch.setattr(real_pipeline, "_run", lambda result, settings, use: None)
    monkeypatch.setattr(real_pipeline, "of_all_ranks", lambda seconds: [0.5, 0.7, 0.8, 1.0])
    found = real_pipeline.computed({"seconds": [0.9, 1.0, 1.5]}, {"pipelines": 2})
    assert found == {
        "computing_seconds": [0.5, 0.7, 0.8, 1.0],
        "real_bubble": pytest.approx(0.25),
        "real_imbalance": pytest.approx(1.2),
    }


def test_what_cannot_be_compared_is_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"missing.json cannot be read .*expected the JSON file of `pipeline`"):
        real_pipeline.main(["--predicted", str(tmp_path / "missing.json")])
    content = {"settings": {"pipelines": 2}, "results": [{"stages": 2, "step_seconds": 1.0}]}
    (tmp_path / "found.json").write_text(json.dumps(content))
    with pytest.raises(
        InputError, match=r"1 ranks; expected as many as a plan in .*found.json has, \[4\]: use torchrun"
    ):
        real_pipeline.main(["--predicted", str(tmp_path / "found.json")])
