"""tools/benchmarks/learning.py on invented metrics: reading, table and plot."""

import json
from pathlib import Path

import numpy as np
import pytest
from benchmarks import learning

from megamtp.config import RESOLVED, write_config
from megamtp.errors import InputError
from tests.cases import small_config

STEPS = 240


def write_metrics(path: Path, factor: float, steps: int = STEPS) -> Path:
    """Writes metrics of two heads. The losses fall from 10 to 4 and 5, multiplied by `factor`."""
    lines = []
    for step in range(1, steps + 1):
        losses = [factor * max(last, 10 - 0.05 * step) for last in (4.0, 5.0)]
        lines.append({"kind": "train", "step": step, "losses": losses})
        if step % 60 == 0:
            lines.append({"kind": "validation", "step": step, "losses": [loss + 0.5 for loss in losses]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_table_compares_variants_with_the_first(tmp_path):
    by_variant = {
        name: learning.read(write_metrics(tmp_path / name, factor), STEPS)
        for name, factor in (("bf16", 1), ("fp8", 1.002))
    }
    *_, head_1, head_2 = learning.tables(learning.results(by_variant)).splitlines()
    assert head_1 == "| fp8 | 1 | 4.0080 | +0.20% | 4.5080 | +0.18% |"
    assert head_2 == "| fp8 | 2 | 5.0100 | +0.20% | 5.5100 | +0.18% |"
    first = learning.results(by_variant)[0]
    assert first["training_difference"] == first["validation_difference"] == 0
    assert len(first["curve"]) == STEPS // learning.POINT_STEPS
    assert first["curve"][0] == pytest.approx(np.mean([10 - 0.05 * step for step in range(1, 21)]), abs=1e-4)


def test_the_plot(tmp_path):
    by_variant = {
        name: learning.read(write_metrics(tmp_path / name, 1 + i / 500), STEPS)
        for i, name in enumerate(learning.VARIANTS)
    }
    learning.draw(by_variant).savefig(tmp_path / "learning.png")
    content = (tmp_path / "learning.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 20_000


def test_an_unfinished_run_is_refused(tmp_path):
    path = write_metrics(tmp_path / "metrics.jsonl", 1.0, steps=STEPS - 1)
    with pytest.raises(InputError, match=f"has 239 training steps; expected {STEPS}, and a validation"):
        learning.read(path, STEPS)


def test_finished_trainings_are_only_read(tmp_path, monkeypatch, capsys):
    config = small_config(1, 4)
    for name in ("bf16", "fp8"):
        (tmp_path / name).mkdir()
        write_config(config, tmp_path / name / RESOLVED)
        write_metrics(tmp_path / name / "metrics.jsonl", 1.0)
    monkeypatch.setattr(learning, "call", lambda *arguments: pytest.fail(f"called {arguments}"))
    learning.main(["--data", "none", "--runs", str(tmp_path), "--steps", str(STEPS), "--output", str(tmp_path)])
    shown = capsys.readouterr().out
    assert f"tokens a step {config.train.global_batch_tokens}, " in shown
    assert "| fp8 | 1 | 4.0000 | +0.00% | 4.5000 | +0.00% |" in shown


def test_an_unwritable_output_is_refused_before_the_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(learning, "call", lambda *arguments: pytest.fail(f"called {arguments}"))
    with pytest.raises(InputError, match=r"--output .*file: File exists; expected a folder"):
        learning.main(["--data", "none", "--prepare", "text", "--output", str(tmp_path / "file")])


def test_a_missing_corpus_is_refused(tmp_path):
    with pytest.raises(InputError, match="see --prepare"):
        learning.main(["--data", str(tmp_path), "--output", str(tmp_path)])
