"""Tests of metrics.jsonl: the numbers in its records, and each step once after any number of resumes."""

import json
import math
from pathlib import Path

import pytest
import torch

from megamtp.config import Config
from megamtp.errors import InputError
from megamtp.model.cost import flops_per_token
from megamtp.training.metrics import Metrics, lacks_validation
from tests.cases import small_config


def config_at(folder: Path, **settings) -> Config:
    return small_config(run__directory=folder, run__tensorboard=False, **settings)


def write_metrics(config: Config, resumed_step: int, steps: range, rank: int = 0) -> None:
    metrics = Metrics(config, resumed_step, rank, world_size=2, device=torch.device("cpu"))
    for step in steps:
        metrics.seconds = {"data": 0.5, "train": 1.5}
        metrics.report_step(step, [1.0 + step, 2.0], gradient_norm=0.1, lr=1e-3, skipped=False)
    metrics.close()


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_record_of_a_step(tmp_path):
    config = config_at(tmp_path, run__peak_flops=1e6)
    write_metrics(config, 0, range(1, 2))
    (record,) = records(tmp_path)
    assert (record["kind"], record["step"], record["losses"]) == ("train", 1, [2.0, 2.0])
    assert record["tokens_per_second"] == pytest.approx(config.train.global_batch_tokens / 2.0)
    flops = record["tokens_per_second"] * flops_per_token(config.model, config.train.sequence_length)
    assert record["flops_per_second"] == pytest.approx(flops)
    assert record["flops_share"] == pytest.approx(flops / 2e6)
    assert record["peak_memory_bytes"] > 1e6


def test_nonfinite_numbers_are_null(tmp_path):
    metrics = Metrics(config_at(tmp_path), 0, 0, world_size=1, device=torch.device("cpu"))
    metrics.seconds = {"train": 1.0}
    metrics.report_step(1, [math.nan, 2.0], gradient_norm=math.inf, lr=1e-3, skipped=True)
    metrics.report_evaluation(1, [math.inf, 2.0])
    metrics.close()
    training, validation = (
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").open()
    )
    assert training["losses"] == validation["losses"] == [None, 2.0] and training["gradient_norm"] is None


def test_resumed_run_drops_later_steps_and_an_incomplete_line(tmp_path):
    config = config_at(tmp_path)
    write_metrics(config, 0, range(1, 8))
    for incomplete in (b'{"kind": "train", "st', b'{"\xff\xfe\x80'):
        with open(tmp_path / "metrics.jsonl", "ab") as stream:
            stream.write(incomplete)
        write_metrics(config, 5, range(6, 8))
        assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]


def test_error_names_a_damaged_line_that_is_not_text(tmp_path):
    config = config_at(tmp_path)
    write_metrics(config, 0, range(1, 3))
    with open(tmp_path / "metrics.jsonl", "ab") as stream:
        stream.write(b"\xff\xfe\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 3 is damaged .*: remove the line"):
        write_metrics(config, 2, range(3, 5))


@pytest.mark.parametrize(
    "line",
    [
        '{"kind": "train", "step": 1e400}',
        '{"step": 1}',
        "[" * 100_000,
        '{"kind": "train", "step": true}',
        '{"kind": "train"}',
        "3",
    ],
)
def test_error_names_any_damaged_record(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 1 is damaged [^\n]*: remove the line"):
        lacks_validation(tmp_path / "metrics.jsonl", 1)


def test_only_rank_0_writes(tmp_path):
    write_metrics(config_at(tmp_path), 0, range(1, 3), rank=1)
    assert list(tmp_path.iterdir()) == []


def test_log_every_steps_always_keeps_the_last_step(tmp_path):
    write_metrics(config_at(tmp_path, run__log_every_steps=8, train__steps=20), 0, range(1, 21))
    assert [record["step"] for record in records(tmp_path)] == [8, 16, 20]


def test_repeated_phases_are_summed():
    metrics = Metrics(config_at("unused"), 0, rank=1, world_size=1, device=torch.device("cpu"))
    for _ in range(2):
        with metrics.phase("train"):
            sum(range(10000))
    assert metrics.seconds.keys() == {"train"}
    assert metrics.seconds["train"] > 0
