"""Opening and reading small corpora, ours and those of megatron-core."""

import json
from types import SimpleNamespace

from benchmarks import data

from tests.measurements import rows


def test_data_opens_and_reads_what_it_invents(tmp_path, monkeypatch, capsys):
    """Both sides, in this process and on small files; the numbers are of no interest."""
    monkeypatch.setattr(
        data, "Fresh", lambda function, *arguments: SimpleNamespace(result=lambda: function(*arguments))
    )
    monkeypatch.setattr(data, "READ_STEPS", 2)
    monkeypatch.setattr(data, "LARGEST_INDEX", 500_000)
    sizes = ["--sizes", "1e5", "1e6", "--megatron-limit", "1e5", "--read-tokens", "1e5"]
    data.main(["--output", str(tmp_path / "results"), "--scratch", str(tmp_path), *sizes])
    results = json.loads((tmp_path / "results/data.json").read_text())["results"]
    opened = [(result["tokens"], result["name"]) for result in results if result["part"] == "opening"]
    assert opened == [(100_000, data.OURS), (100_000, data.FIRST), (100_000, data.AGAIN), (1_000_000, data.OURS)]
    read = {result["name"]: result["tokens_per_second"] for result in results if result["part"] == "reading"}
    assert list(read) == [*data.READERS, "GPTDataset"] and min(read.values()) > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
    assert (tmp_path / "results/data.png").stat().st_size > 10_000
    shown = [row[:2] for row in rows(capsys.readouterr().out)]
    assert shown[:2] == [["tokens", "opened by"], ["1e+05", data.OURS]] and shown[-1][0] == "GPTDataset"
