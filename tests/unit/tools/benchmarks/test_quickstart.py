"""Losses of an invented quickstart run."""

import dataclasses
import json
from pathlib import Path

import pytest
from benchmarks import quickstart

from megamtp.config import RESOLVED, read_config, write_config
from megamtp.errors import InputError
from megamtp.training.metrics import FILE as METRICS

ROOT = Path(__file__).parents[4]


def write_run(folder: Path, last_step: int) -> None:
    (folder / "corpus").mkdir(parents=True)
    (folder / "corpus/corpus.json").write_text(json.dumps({"unigram_entropy": 6.0}))
    corpus = [f"data.train={folder}/corpus/train", f"data.validation={folder}/corpus/validation"]
    config = read_config([str(ROOT / "configs/quickstart.yaml"), *corpus, f"run.directory={folder}"])
    train = dataclasses.replace(config.train, steps=2)
    write_config(dataclasses.replace(config, train=train), folder / RESOLVED)
    records = [
        {"kind": "train", "step": 1, "losses": [5.5, 5.6, 5.7, 5.8]},
        {"kind": "validation", "step": last_step, "losses": [4.25, 4.5, 5.0, 5.125]},
    ]
    (folder / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))


def test_losses_of_a_finished_run(tmp_path, capsys):
    write_run(tmp_path / "run", last_step=2)
    quickstart.main(["--run", str(tmp_path / "run"), "--output", str(tmp_path / "results")])
    shown = capsys.readouterr().out
    assert "| validation loss | 4.250 | 4.500 | 5.000 | 5.125 |" in shown
    assert "| unigram entropy (6.000) minus validation loss | 1.750 | 1.500 | 1.000 | 0.875 |" in shown
    written = json.loads((tmp_path / "results/quickstart.json").read_text())
    assert written["settings"]["steps"] == 2
    assert [result["training"] for result in written["results"]] == [5.5, 5.6, 5.7, 5.8]
    assert (tmp_path / "results/quickstart.png").stat().st_size > 10_000


def test_an_unfinished_run_is_refused(tmp_path):
    write_run(tmp_path / "run", last_step=1)
    with pytest.raises(InputError, match="run is not finished or has no validation corpus; expected the quickstart's"):
        quickstart.main(["--run", str(tmp_path / "run"), "--output", str(tmp_path)])
