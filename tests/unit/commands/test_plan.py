"""The output of `plan` for configurations that fit into the memory of a GPU, and for one that does not fit."""

import re
import subprocess
import sys

import pytest

from megamtp.planning.gpus import GPUS
from megamtp.planning.partition import whole_loss_partition
from megamtp.planning.planner import plan
from tests.cases import ROOT, pipeline_config


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "tools/plan.py", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_output_for_configurations_that_fit_and_do_not_fit():
    fits = run("configs/6.7b_n4.yaml", "--gpus", "64", "--bandwidth", "100e9", "train.steps=10")
    assert fits.returncode == 0, fits.stderr
    assert "**total**" in fits.stdout and "days for 10 steps" in fits.stdout
    assert "\n| **total of the 8 ranks of a node** | 9.41 |\n| checkpoint on disk (2 are kept while " in fits.stdout
    assert "\n| optimizer, s per step | 0.00" in fits.stdout
    offloaded = run(
        "configs/6.7b_n4.yaml", "--gpus", "64", "engine.offload_optimizer=true", "engine.offload_parameters=true"
    )
    assert "\n| optimizer, s per step | on the host: not planned |" in offloaded.stdout
    assert "\n| exposed communication, without weights from the host (not planned), s per step |" in offloaded.stdout
    chained = run("configs/6.7b_n4.yaml", "--gpus", "64", "model.head_kind=chained")
    # a depth has the parameters of 1 + 2 * 4096**2 / 202.4e6 = 1.166 layers, so three depths replace 3 of 31 layers
    assert "\n28 trunk layers and 4 heads have " in chained.stdout
    assert "compared with 31 trunk layers and one head\n" in chained.stdout
    assert "\nheads read each other, so the activations of all heads exist at the same time: " in chained.stdout
    assert "heads read each other" not in fits.stdout and "compared with" not in fits.stdout
    large = run("configs/13b_n4.yaml", "--gpus", "8")
    assert large.returncode == 1
    assert "does not fit: needs" in large.stdout
    assert "nearest configuration that fits: train.micro_batch_size=1" in large.stdout
    pipeline = run(
        "configs/13b_n4.yaml", "--gpus", "64", "engine.kind=pipeline", "engine.num_stages=4", "train.micro_batch_size=1"
    )
    assert pipeline.returncode == 0, pipeline.stderr
    assert pipeline.stdout.count("| stage ") == 4 and "heads 1-4" in pipeline.stdout
    assert (
        "waiting for other stages" in pipeline.stdout and "\nwith engine.spread_losses=true: step " in pipeline.stdout
    )
    assert "\nengine.spread_losses=true is predicted to be faster: 0.9" in pipeline.stdout
    assert "train.precision" not in fits.stdout + pipeline.stdout
    (layers,) = (
        line.split()[-1] for line in pipeline.stdout.splitlines() if line.startswith("a run uses this partition with ")
    )
    partition = whole_loss_partition(pipeline_config("13b", 4, layers), 16)
    assert [stage.num_layers for stage in partition.stages] == list(
        map(int, layers.partition("[")[2].strip("]").split(","))
    )
    limit = plan(pipeline_config("13b", 4), 64, GPUS["h100"]).peak_bytes + 1  # spread losses need more
    settings = [
        "engine.kind=pipeline",
        "engine.num_stages=4",
        "train.micro_batch_size=1",
        f"engine.stage_memory_bytes={limit}",
    ]
    limited = run("configs/13b_n4.yaml", "--gpus", "64", *settings)
    assert limited.returncode == 0, limited.stderr
    assert "\nwith engine.spread_losses=true: spread losses do not fit engine.stage_memory_bytes=" in limited.stdout
    wrong = run("configs/13b_n4.yaml", "--gpus", "7")
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1 and "7 ranks" in wrong.stderr


@pytest.mark.parametrize("engine", [[], ["engine.kind=pipeline", "engine.num_stages=4"]], ids=["zero3", "pipeline"])
def test_a_plan_in_fp8_also_says_how_long_a_step_in_bf16_takes(engine):
    for size, settings, verdict in (
        ("6.7b", [], "not predicted to be faster: 1."),
        ("0.3b", ["train.sequence_length=64"], "predicted to be faster: 0."),
    ):
        settings = [f"configs/{size}_n4.yaml", "train.micro_batch_size=1", *settings, *engine]
        fp8, bf16 = (run(*settings, "--gpus", "64", f"train.precision={kind}").stdout for kind in ("fp8", "bf16"))
        (step,) = re.findall(r"\n\| \*\*step, s\*\* \| \*\*(.*)\*\* \|", bf16)
        assert f"\nwith train.precision=bf16: step {step} s, at most " in fp8
        assert f"\ntrain.precision=bf16 is {verdict}" in fp8
        assert fp8.count("\nwith engine.spread_losses=true: ") == len(engine) // 2
