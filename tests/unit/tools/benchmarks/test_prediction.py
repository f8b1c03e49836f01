"""Comparison of emulated step times with real step times, on invented results."""

import json

import pytest
from benchmarks import prediction

from megamtp.errors import InputError


def test_emulated_steps_are_compared_with_real_steps(tmp_path, monkeypatch, capsys):
    def write_results(name: str, ranks: int, milliseconds: list[float]) -> str:
        results = [{"size": "1.3b", "heads": 1, "variant": "ours", "milliseconds": [time]} for time in milliseconds]
        results = [result | {"heads": heads} for heads, result in enumerate(results, start=1)]
        circumstances = {"card": "some card", "date": "2026-11-25"}
        (tmp_path / name).write_text(
            json.dumps({"settings": {"ranks": ranks}, "circumstances": circumstances, "results": results})
        )
        return str(tmp_path / name)

    real, near, far = (
        write_results("real", 2, [100.0, 200.0]),
        write_results("near", 2, [109.0, 190.0]),
        write_results("far", 2, [111.0, 190.0]),
    )
    monkeypatch.setattr("sys.argv", ["benchmark.py", "prediction"])
    for emulated, verdict in (
        (near, "in 2 of 2 rows; largest error 9.0%: holds"),
        (far, "in 1 of 2 rows; largest error 11.0%: FAILS"),
    ):
        prediction.main(["--measured", real, "--emulated", emulated, "--output", str(tmp_path)])
        assert verdict in capsys.readouterr().out
    with pytest.raises(InputError, match="has other sizes, heads, variants or ranks than"):
        prediction.main(["--measured", real, "--emulated", write_results("others", 4, [100.0, 200.0])])
    with pytest.raises(InputError, match=r"nowhere cannot be read .*; expected the JSON file of `overhead`"):
        prediction.main(["--measured", real, "--emulated", str(tmp_path / "nowhere")])
