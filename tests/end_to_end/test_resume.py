"""Tests that a resumed run equals an uninterrupted one bitwise, and a run of other ranks up to the order of sums."""

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megamtp.checkpoint.shards import shard_name
from megamtp.checkpoint.slices import SLICES
from megamtp.checkpoint.store import checkpoints, read_manifest, verify
from tests.cases import global_batch, own_share, small_config
from tests.end_to_end import killed_pretrain
from tests.end_to_end.jobs import damage, losses, pretrain, records
from tests.end_to_end.killed_pretrain import KILLED_STEP
from tests.ranks import run_ranks
from tests.saved import load_weights

PIPELINE = ["engine.kind=pipeline", "engine.num_stages=2", "engine.stage_layers=[3,1]"]  # a head on each stage
SPREAD = "engine.spread_losses=true"


FULL = pytest.mark.full
KILLED = [
    (2, []),
    (4, [*PIPELINE, SPREAD]),
    pytest.param(2, [*PIPELINE, "train.precision=bf16"], marks=FULL),
    pytest.param(4, PIPELINE, marks=FULL),
]


@pytest.mark.parametrize(("num_ranks", "settings"), KILLED)
@pytest.mark.timeout(600)
def test_killed_and_resumed_equals_uninterrupted(num_ranks, settings, arguments, tmp_path):
    whole, killed, arguments = tmp_path / "whole", tmp_path / "killed", [*arguments, *settings]
    finished = pretrain([*arguments, f"run.directory={whole}"], num_ranks)
    assert finished.returncode == 0, finished.stderr
    if settings:
        output = finished.stdout + finished.stderr
        assert "embedding, trunk 1-2, head 1" in output and "slowest stage / mean" in output
        # "is predicted to be faster" or "is not predicted to be faster"
        assert f"engine.spread_losses={str(SPREAD not in settings).lower()} is " in output
        assert "megamtp: warning:" in output and "so the 2 stages are idle for" in output
    pretrain([*arguments, f"run.directory={killed}"], num_ranks, killed_pretrain.entry)
    assert [record["step"] for record in records(killed)] == list(range(1, KILLED_STEP))
    assert [path.name for path in checkpoints(killed)] == ["step-0000010"]
    resumed = pretrain([*arguments, f"run.directory={killed}"], num_ranks)
    assert resumed.returncode == 0, resumed.stderr
    assert [record["step"] for record in records(killed)] == list(range(1, 21))
    assert losses(killed) == losses(whole)
    assert [record["losses"] for record in records(killed, "validation")] == [
        record["losses"] for record in records(whole, "validation")
    ]
    assert losses(whole)[-1][0] < losses(whole)[0][0] - 0.5
    (_, expected), (_, weights) = load_weights(checkpoints(whole)[-1]), load_weights(checkpoints(killed)[-1])
    assert expected.keys() == weights.keys()
    assert all(torch.equal(expected[name], weights[name]) for name in expected)


@pytest.fixture(scope="module")
def twice_saved(arguments, tmp_path_factory) -> Path:
    """A ZeRO-3 run of 20 steps on two ranks, with checkpoints at steps 10 and 20."""
    directory = tmp_path_factory.mktemp("twice_saved") / "run"
    finished = pretrain([*arguments, f"run.directory={directory}"], 2)
    assert finished.returncode == 0, finished.stderr
    return directory


def test_saves_are_reported(twice_saved):
    saves = records(twice_saved, "checkpoint")
    assert [record["step"] for record in saves] == [10, 20]
    for record, checkpoint in zip(saves, checkpoints(twice_saved), strict=True):
        index = (checkpoint / SLICES).stat().st_size
        assert record["bytes"] == read_manifest(checkpoint).file_bytes - index
        assert record["bytes_per_second"] == pytest.approx(record["bytes"] / record["write_seconds"])
        assert record["copy_seconds"] > 0 and record["wait_seconds"] > 0


@pytest.mark.parametrize("kind", ["truncated", *(pytest.param(kind, marks=FULL) for kind in ("flipped", "missing"))])
def test_resumes_from_the_newest_intact_checkpoint(kind, twice_saved, arguments, tmp_path):
    """The file of the second rank is damaged. The final state is bitwise the same."""
    shutil.copytree(twice_saved, tmp_path / "run")
    old, new = checkpoints(tmp_path / "run")
    damage(new / shard_name(1), kind)
    resumed = pretrain([*arguments, f"run.directory={tmp_path}/run"], 2)
    assert resumed.returncode == 0, resumed.stderr
    (line,) = [line for line in resumed.stdout.splitlines() if "skipped" in line]
    assert f"skipped {new.name}: " in line and shard_name(1) in line
    assert checkpoints(tmp_path / "run") == [old, new]
    assert losses(tmp_path / "run") == losses(twice_saved)
    assert verify(new).files == verify(checkpoints(twice_saved)[-1]).files


def test_another_global_batch_size_continues_at_the_next_window(arguments, tmp_path):
    """With a learning rate of 0, losses identify windows: two steps of half the size read the windows of one step."""
    arguments = [*arguments, "optimizer.lr=0", "train.global_batch_tokens=512", "data.validation=null"]
    run_directory = tmp_path / "run"

    def job(directory: Path, *settings: str) -> subprocess.CompletedProcess:
        return pretrain([*arguments, *settings, f"run.directory={directory}"])

    assert job(run_directory, "train.steps=4").returncode == 0
    shutil.copytree(run_directory, tmp_path / "whole")
    assert job(tmp_path / "whole", "train.steps=6").returncode == 0
    halved = job(run_directory, "train.steps=8", "train.global_batch_tokens=256")
    assert halved.returncode == 0, halved.stderr
    expected, actual = torch.tensor(losses(tmp_path / "whole")), torch.tensor(losses(run_directory))
    means = actual[4:].view(2, 2, -1).mean(dim=1)
    torch.testing.assert_close(means, expected[4:], rtol=1e-6, atol=0)
    assert (
        means[0] - expected[2]
    ).abs().min() > 1e-4  # not the windows at step x batch size, which the run has trained on
    (corpus,) = read_manifest(checkpoints(run_directory)[-1]).state["data"]["corpora"]
    assert corpus["next_window"] == 4 * 16 + 4 * 8 and corpus["trained_tokens"] == 96 * 32
    refused = job(run_directory, "train.steps=9", "train.sequence_length=64")
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert (
        "train.sequence_length was 32, is now 64; expected the windows of the run so far" in line
        and "accept_changes" in line
    )
    accepted = job(run_directory, "train.steps=9", "train.sequence_length=64", "data.accept_changes=true")
    assert accepted.returncode == 0, accepted.stderr
    assert "after 3,072 tokens of training, in a new order" in accepted.stdout
    assert "epochs" in accepted.stdout and len(losses(run_directory)) == 9


@pytest.mark.timeout(600)
def test_resumes_with_another_engine_and_number_of_ranks(twice_saved, arguments, tmp_path):
    """Two pipelines of two stages resume step 10 of two ZeRO-3 ranks: the same losses up to the order of sums."""
    shutil.copytree(twice_saved, tmp_path / "run")
    shutil.rmtree(checkpoints(tmp_path / "run")[-1])
    finished = pretrain([*arguments, *PIPELINE, f"run.directory={tmp_path}/run"], 4)
    assert finished.returncode == 0, finished.stderr
    assert "engine.kind: zero3 -> pipeline" in finished.stdout
    actual, expected = losses(tmp_path / "run"), losses(twice_saved)
    assert actual[:10] == expected[:10] and len(actual) == 20
    torch.testing.assert_close(torch.tensor(actual[10:]), torch.tensor(expected[10:]), rtol=1e-5, atol=0)


@pytest.mark.timeout(600)
def test_pipeline_reads_and_reports_the_same_as_zero3(arguments, tmp_path):
    """One ZeRO-3 rank, two pipelines of two stages, and one pipeline with spread losses give the same metrics."""
    arguments = [*arguments, "train.steps=5", "run.evaluate_every_steps=5"]
    for name, ranks, settings in (("zero3", 1, []), ("pipeline", 4, PIPELINE), ("spread", 2, [*PIPELINE, SPREAD])):
        finished = pretrain([*arguments, *settings, f"run.directory={tmp_path}/{name}"], ranks)
        assert finished.returncode == 0, finished.stderr
    compared = {"train": ("losses", "gradient_norm", "lr"), "validation": ("losses",)}
    for name, (kind, keys) in itertools.product(("pipeline", "spread"), compared.items()):
        expected, actual = (records(tmp_path / run_name, kind) for run_name in ("zero3", name))
        assert len(expected) == len(actual) == (5 if kind == "train" else 1)
        for expected_record, record in zip(expected, actual, strict=True):
            for key in keys:
                assert record[key] == pytest.approx(expected_record[key], rel=1e-4)


def losses_of_ten_steps(world_size: int, kind: str) -> list[list[float]]:
    """Returns the mean losses per head of ten steps on two alternating global batches.

    Each has four micro-batches with different numbers of ignored targets.
    """
    from megamtp.engines.base import count_targets
    from megamtp.engines.zero import ZeroEngine

    config = small_config(world_size, accumulation=4 // world_size, engine__kind=kind, model__num_future_tokens=3)
    engine = ZeroEngine(config)
    losses_of_steps = []
    for step in range(10):
        own = own_share(global_batch(config, step % 2, 4), engine.rank, world_size)
        counts = count_targets(own, True, world_size, engine.device)
        nll_sums = engine.train_batch(own, counts, 1e-2).nll_sums.double()
        dist.all_reduce(nll_sums)
        losses_of_steps.append([nll / count for nll, count in zip(nll_sums.tolist(), counts, strict=True)])
    return losses_of_steps


def test_losses_do_not_depend_on_the_world_size():
    one, two, four = (torch.tensor(run_ranks(losses_of_ten_steps, size, size, "zero3")[0]) for size in (1, 2, 4))
    assert one.shape == (10, 3)
    torch.testing.assert_close(two, one, rtol=1e-5, atol=0)
    torch.testing.assert_close(four, one, rtol=1e-5, atol=0)
    assert (one[0] - one[8]).min() > 0.1  # the model has learned, so an error could grow
    zero1 = torch.tensor(run_ranks(losses_of_ten_steps, 2, 2, "zero1")[0])
    torch.testing.assert_close(zero1, one, rtol=1e-5, atol=0)
