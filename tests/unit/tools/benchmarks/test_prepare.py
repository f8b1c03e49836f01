"""tools/benchmark.py prepare: its table on invented times, and the files of a small measurement."""

import json

import pytest
from benchmarks import prepare
from benchmarks.prepare import SENTENCEPIECE

from megamtp.errors import InputError


def test_the_table_on_invented_times():
    times = {
        SENTENCEPIECE: ([2.0, 4.0], [2.0, 2.0]),
        "1 worker": ([4.0, 5.0], [4.0, 2.5]),
        "2 workers": ([2.0, 2.5], [4.0, 4.0]),
    }
    results = [
        {"variant": name, "bytes": 10_000_000, "seconds": wall, "cpu_seconds": cpu}
        for name, (wall, cpu) in times.items()
    ]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in prepare.tables(results).splitlines()]
    assert rows[2] == [SENTENCEPIECE, "3.75 [2.50, 5.00]", "5.00 [5.00, 5.00]", "", ""]
    assert rows[3] == ["1 worker", "2.25 [2.00, 2.50]", "3.25 [2.50, 4.00]", "0.65 [0.50, 0.80]", ""]
    assert rows[4][3:] == ["0.50 [0.50, 0.50]", "2.00 [2.00, 2.00]"]


def test_a_small_measurement(tmp_path, capsys):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"some text {number} of many words\n" * 100)
    arguments = [
        "--input",
        str(tmp_path),
        "--output",
        str(tmp_path / "results"),
        "--vocab-size",
        "280",
        "--rounds",
        "2",
    ]
    prepare.main(arguments)
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["prepare.json", "prepare.png"]
    written = json.loads((tmp_path / "results/prepare.json").read_text())
    assert [result["variant"] for result in written["results"]] == [SENTENCEPIECE, "1 worker", "2 workers"]
    assert all(len(result[key]) == 2 for result in written["results"] for key in ("seconds", "cpu_seconds"))
    assert "| 2 workers | " in capsys.readouterr().out
    with pytest.raises(InputError, match=r"--workers \[2\]; expected 1 among them"):
        prepare.main([*arguments, "--workers", "2"])
