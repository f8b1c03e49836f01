"""Tests of the report's plot, table, warnings and checks on invented metrics."""

import dataclasses
import json
import math
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from megamtp.commands import report
from megamtp.data.corpus import Corpus
from megamtp.errors import InputError

ENTROPY = 5.5
LEARNED = [2.5, 3.25, 3.75]


def write_run(folder: Path, validation: list[float] | None, entropy: float | None = ENTROPY) -> Path:
    """Writes a run of 400 steps and three heads. Losses fall from ln(2000) to `validation`."""
    run, corpus = folder / "quickstart", folder / "corpus"
    run.mkdir()
    corpus.mkdir()
    config = {
        "model": {"dim": 32, "num_layers": 5, "num_future_tokens": 3, "num_attention_heads": 4, "vocab_size": 2000},
        "train": {"steps": 400, "global_batch_tokens": 64, "micro_batch_size": 1, "sequence_length": 64},
        "data": {"train": str(corpus / "train"), "validation": str(corpus / "validation")},
        "run": {"directory": str(run)},
    }
    (run / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    if entropy is not None:
        (corpus / "corpus.json").write_text(json.dumps(dataclasses.asdict(Corpus({}, 2000, {}, {}, 3.5, entropy, []))))
    noise, last = np.random.default_rng(0), np.array(validation or LEARNED)
    lines = []
    for step in range(1, 401):
        losses = last + (math.log(2000) - last) * math.exp(-step / 60)
        lines.append({"kind": "train", "step": step, "losses": list(losses + noise.normal(0, 0.08, 3)), "lr": 1e-3})
        if step % 40 == 0 and validation:
            lines.append({"kind": "validation", "step": step, "losses": list(last if step == 400 else losses + 0.05)})
    (run / report.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def call(monkeypatch, *arguments) -> int:
    """Calls the command and returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    try:
        report.main()
    except SystemExit as error:
        return error.code
    return 0


def picture_size(run: Path) -> tuple[int, int]:
    content = (run / "loss.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(content) > 20_000
    return struct.unpack(">II", content[16:24])


def test_plot_and_table(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path, LEARNED)
    assert call(monkeypatch, run) == 0
    width, height = picture_size(run)
    assert width > 1000
    assert height > 600
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head[0] == "head"
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert [row[2:] for row in rows] == [["2.5000", "3.0000"], ["3.2500", "2.2500"], ["3.7500", "1.7500"]]
    assert all(abs(float(row[1]) - loss) < 0.4 for row, loss in zip(rows, LEARNED, strict=True))
    assert {path.name for path in run.iterdir()} == {"config.yaml", "metrics.jsonl", "loss.png"}


@pytest.mark.parametrize(
    ("validation", "min_margin", "verdicts"),
    [
        (LEARNED, 3.0, ["OK", "OK", "OK"]),
        (LEARNED, 3.001, ["FAILED", "OK", "OK"]),
        ([5.6, 5.7, 5.8], 0.0, ["FAILED", "OK", "OK"]),
        ([2.5, 2.5, 3.75], 1.0, ["OK", "FAILED", "OK"]),
        ([2.5, 3.75, 3.25], 1.0, ["OK", "OK", "FAILED"]),
        ([math.nan, 3.25, 3.75], 1.0, ["FAILED", "FAILED", "OK"]),
    ],
)
def test_checks_of_min_margin_and_exit_status(tmp_path, monkeypatch, capsys, validation, min_margin, verdicts):
    status = call(monkeypatch, write_run(tmp_path, validation), "--min-margin", min_margin)
    lines = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[4:]]
    assert [verdict for verdict in lines if verdict != "WARNING"] == verdicts
    assert status == (1 if "FAILED" in verdicts else 0)


@pytest.mark.parametrize(("validation", "entropy"), [(None, ENTROPY), (LEARNED, None)])
def test_min_margin_requires_validation_losses_and_entropy(tmp_path, monkeypatch, capsys, validation, entropy):
    run = write_run(tmp_path, validation, entropy)
    assert call(monkeypatch, run) == 0
    picture_size(run)
    assert all(line.split()[-1] == "-" for line in capsys.readouterr().out.splitlines()[1:])
    with pytest.raises(InputError, match="--min-margin"):
        call(monkeypatch, run, "--min-margin", 1)


def test_run_name_with_dollar_signs_is_not_a_formula(tmp_path, monkeypatch):
    run = write_run(tmp_path, LEARNED).rename(tmp_path / r"a$\none{$")
    assert call(monkeypatch, run) == 0
    picture_size(run)


def test_smoothed_losses_ignore_skipped_steps(tmp_path, monkeypatch):
    run = write_run(tmp_path, LEARNED)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for number, line in enumerate(lines, start=1) if not 150 <= number <= 152]
    skipped = [json.dumps({"kind": "train", "step": step, "losses": [None] * 3}) + "\n" for step in range(150, 153)]
    (run / "metrics.jsonl").write_text("".join([*lines[:149], *skipped, *lines[152:]]))
    training, _ = report.read_losses(run / "metrics.jsonl", 3)
    assert np.isnan(training.losses).sum() == 9 and len(training.steps) == 400
    smooth = report._smooth(training.losses[:, 0])
    assert np.isfinite(smooth).all()
    losses = [json.loads(line)["losses"][0] for line in kept if json.loads(line)["kind"] == "train"]
    assert smooth[150] == pytest.approx(np.mean(losses[146:152]))  # steps 147 to 155, of which three have no loss
    assert smooth[-20] == pytest.approx(np.mean(losses[-24:-15]))
    assert np.isnan(report._smooth(np.array([1.0, np.nan]))[1])


def test_incomplete_last_line_is_ignored(tmp_path, monkeypatch):
    run = write_run(tmp_path, LEARNED)
    with open(run / report.METRICS, "a") as stream:
        stream.write('{"kind": "train", "st')
    assert call(monkeypatch, run) == 0


@pytest.mark.parametrize(
    "line",
    [
        '{"kind": "train", "st',
        "3",
        '{"kind": "train", "step": 1}',
        '{"kind": "train", "step": 1, "losses": [1, 2]}',
        '{"kind": "train", "step": 1, "losses": [1, 2, "x"]}',
        '{"step": 1, "losses": [1, 2, 3]}',
        '{"kind": "train", "step": 1, "losses": [1, 2, 1e308]}',
        '{"kind": "train", "step": 1, "losses": [1, 2, 1e400]}',
        '{"kind": "train", "step": 1, "losses": [1, 2, ' + "9" * 400 + "]}",
        '{"kind": "train", "step": 1, "losses": [1, 2, true]}',
        '{"kind": "train", "step": 1e400, "losses": [1, 2, 3]}',
        '{"kind": "train", "step": 1.5, "losses": [1, 2, 3]}',
        '{"kind": "train", "step": ' + "9" * 400 + ', "losses": [1, 2, 3]}',
        '{"kind": [1], "step": 1, "losses": [1, 2, 3]}',
        '{"kind": "train", "step": 1, "losses": ' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
)
def test_error_names_a_damaged_line(tmp_path, monkeypatch, line):
    run = write_run(tmp_path, LEARNED)
    lines = (run / report.METRICS).read_text().splitlines()
    lines[6] = line
    (run / report.METRICS).write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 7 is damaged") as caught:
        call(monkeypatch, run)
    assert "\n" not in str(caught.value)
    assert not (run / "loss.png").exists()


def test_smoothed_losses_have_no_spike_at_the_ends():
    """Noise is averaged at the first and last steps as it is elsewhere, even if the last step is an outlier."""
    noise = np.random.default_rng(0).normal(0, 1, 4000)
    smooth = report._smooth(3 + noise)
    assert np.abs(smooth - 3).max() < 5 / math.sqrt(41)  # at an end 41 steps, elsewhere 81
    smooth = report._smooth(np.where(np.arange(4000) == 3999, 7.0, 3.0))
    assert smooth[-1] == pytest.approx(3 + 4 / 41) and smooth[0] == 3


@pytest.mark.parametrize(
    ("losses", "warnings"),
    [
        ([4.0, 3.0, 3.0 + report.MAX_RISE / 2], []),
        (
            [4.0, 3.0, 3.25],
            ["head 1's validation loss rises: 3.2500 is 0.2500 above its lowest, 3.0000 at step 80; train fewer"],
        ),
        ([math.nan, 3.0, 3.25], ["head 1's validation loss rises"]),
        ([4.0, 3.0, math.nan], []),
        ([math.nan] * 3, []),
        ([5.6], ["head 1's validation loss 5.6000 is above the unigram entropy 5.5000"]),
        (
            [5.0, 5.6],
            ["head 1's validation loss rises", "head 1's validation loss 5.6000 is above the unigram entropy"],
        ),
    ],
)
def test_warnings_about_validation_losses(tmp_path, monkeypatch, capsys, losses, warnings):
    run = write_run(tmp_path, None)
    with open(run / report.METRICS, "a") as stream:
        for step, loss in enumerate(losses, start=1):
            record = {
                "kind": "validation",
                "step": 40 * step,
                "losses": [None if math.isnan(loss) else loss, 3.5 - step / 10, 3.75],
            }
            stream.write(json.dumps(record) + "\n")
    assert call(monkeypatch, run) == 0
    lines = capsys.readouterr().out.splitlines()[4:]
    assert len(lines) == len(warnings)
    for line, start in zip(lines, warnings, strict=True):
        assert line.startswith(f"WARNING: {start}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x" * 300, "x is not a folder"),
        ("none", "none is not a folder"),
        ("a=b", "a=b is not a folder"),
        ("", "has no config.yaml"),
    ],
)
def test_error_names_a_folder_without_a_run(tmp_path, monkeypatch, name, words):
    with pytest.raises(InputError, match=f"{words}; expected the run.directory of a run"):
        call(monkeypatch, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [os.remove, lambda path: path.write_text("")])
def test_missing_metrics_are_one_line_and_status_2(tmp_path, monkeypatch, capsys, damage):
    run = write_run(tmp_path, LEARNED)
    damage(run / report.METRICS)
    monkeypatch.setattr(sys, "argv", ["report", str(run)])
    with pytest.raises(SystemExit) as caught:
        report.entry()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "metrics.jsonl" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "entropy", ["", '"unigram_entropy": 1e400', '"unigram_entropy": NaN', f'"unigram_entropy": {"9" * 400}']
)
def test_damaged_corpus_summary_is_an_error(tmp_path, monkeypatch, entropy):
    run = write_run(tmp_path, LEARNED)
    (tmp_path / "corpus" / "corpus.json").write_text(f"{{{entropy}}}")
    with pytest.raises(InputError, match=r"corpus\.json is damaged"):
        call(monkeypatch, run)
