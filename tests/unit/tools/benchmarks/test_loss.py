"""The table and the plot of the loss benchmark, on invented times."""

from benchmarks import loss

from tests.measurements import rows


def test_the_table_shows_the_dtype_of_gradient_sums(tmp_path):
    names = ["ours", "liger-kernel", "cut-cross-entropy", loss.PRODUCTS]
    results = [
        {
            "dim": dim,
            "vocabulary": vocabulary,
            "name": name,
            "sum_dtype": "float32" if name == "ours" else "bfloat16",
            "milliseconds": [4.0, 5.0, 6.0 + index],
            "over_floor": 1.2 + index,
            "extra_bytes": None if index == 3 else 2**29,
        }
        for dim, vocabulary in loss.SHAPES
        for index, name in enumerate(names)
    ]
    _, *table_rows = rows(loss.tables(results))
    assert len(table_rows) == 12
    assert table_rows[0] == ["2048", "32000", "ours", "float32", "5.00 [4.00, 6.00]", "1.20", "0.50"]
    assert (table_rows[3][3], table_rows[3][-1]) == ("bfloat16", "-")
    loss._draw(results).savefig(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 10_000
