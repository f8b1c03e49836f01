"""Opening and reading of small corpora with megamtp and with megatron-core."""

import json
from types import SimpleNamespace

from benchmarks import data

from tests.measurements import rows


def test_data_measures_opening_and_reading(tmp_path, monkeypatch, capsys):
    """Runs in this process on small files. The measured values mean nothing."""
    monkeypatch.setattr(
        data, "ProcessCall", lambda function, *arguments: SimpleNamespace(run=lambda: function(*arguments))
    )
    monkeypatch.setattr(data, "READ_STEPS", 2)
    monkeypatch.setattr(data, "MAX_EVEN_TOKENS", 500_000)
    sizes = ["--sizes", "1e5", "1e6", "--megatron-limit", "1e5", "--read-tokens", "1e5"]
    data.main(["--output", str(tmp_path / "results"), "--scratch", str(tmp_path), *sizes])
    results = json.loads((tmp_path / "results/data.json").read_text())["results"]
    opening = [(result["tokens"], result["name"]) for result in results if result["part"] == "opening"]
    assert opening == [
        (100_000, data.OURS),
        (100_000, data.GPT_FIRST),
        (100_000, data.GPT_CACHED),
        (1_000_000, data.OURS),
    ]
    reading = {result["name"]: result["tokens_per_second"] for result in results if result["part"] == "reading"}
    assert list(reading) == [*data.READ_VARIANTS, "GPTDataset"] and min(reading.values()) > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
    assert (tmp_path / "results/data.png").stat().st_size > 10_000
    shown = [row[:2] for row in rows(capsys.readouterr().out)]
    assert shown[:2] == [["tokens", "opened with"], ["1e+05", data.OURS]] and shown[-1][0] == "GPTDataset"
