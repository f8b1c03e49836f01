"""The loss's table and picture, on invented times."""

from benchmarks import loss

from tests.measurements import rows


def test_loss_says_in_what_dtype_gradients_are_summed(tmp_path):
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
    _, *found = rows(loss.tables(results))
    assert len(found) == 12
    assert found[0] == ["2048", "32000", "ours", "float32", "5.00 [4.00, 6.00]", "1.20", "0.50"]
    assert (found[3][3], found[3][-1]) == ("bfloat16", "-")
    loss._draw(results).savefig(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 10_000
