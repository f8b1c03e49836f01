"""The memory of pipeline stages against recorded measurements."""

import json

import pytest

from megamtp.planning.stage_memory import OPTIMIZER, StageContents, bytes_saved_by_layer, stage_memory
from tests.cases import ROOT, published_config


def recorded_pipelines() -> list[tuple[dict, dict]]:
    """Returns (a pipeline whose stages were measured, its settings)."""
    contents = [json.loads(path.read_text()) for path in sorted((ROOT / "tools/results").glob("pipeline*.json"))]
    return [(result, content["settings"]) for content in contents for result in content["results"]]


def test_memory_prediction_is_within_5_percent_of_all_recorded_stages():
    """With all sizes, vocabularies and numbers of stages, and with whole and spread losses."""
    num_stages = 0
    for result, settings in recorded_pipelines():
        batch = f"train.global_batch_tokens={settings['T'] * settings['micro-batches'] * settings['pipelines']}"
        config = published_config(
            result["size"],
            result["heads"],
            "engine.kind=pipeline",
            f"engine.num_stages={result['stages']}",
            f"model.vocab_size={result['vocabulary']}",
            "train.micro_batch_size=1",
            batch,
            "head_loss.chunk_rows=4096",  # the default at the time of the measurement
        )
        spread = result["plan"] == "spread losses"
        for stage, peak in enumerate(result["peak_bytes"]):
            first_head = sum(result["heads_of_stages"][:stage])
            heads = range(first_head, first_head + result["heads_of_stages"][stage])
            num_trunk_layers, rows = result["layers"][stage] - len(heads), result["rows"][stage]
            contents = StageContents(num_trunk_layers, heads, stage == 0, rows, spread)
            memory = stage_memory(config, settings["pipelines"], contents, result["alive"][stage])
            predicted = sum(size for kind, size in memory.items() if kind != OPTIMIZER)
            assert predicted == pytest.approx(peak, rel=0.05), (result["plan"], contents)
            num_stages += 1
    assert num_stages == 312


@pytest.mark.parametrize(
    ("contents", "num_more", "rows"),
    [
        (StageContents(1, range(1, 4), False, 32000), 2, 32000),  # three heads with their own
        (StageContents(1, range(3, 4), False, 32000), 0, 32000),
        (StageContents(3, range(0), False, 8000, spread=True), 3, 8000),  # rows of all four
        (StageContents(3, range(0), True, 0), 0, 0),
    ],
)
def test_unembeddings_of_heads_take_memory(contents, num_more, rows):
    settings = ["engine.kind=pipeline", "engine.num_stages=4", "train.micro_batch_size=1"]
    shared, replicated = (
        stage_memory(published_config("6.7b", 4, f"model.unembedding={unembedding}", *settings), 1, contents, 2)
        for unembedding in ("shared", "replicated")
    )
    more = num_more * (rows + 1) * 4096
    differences = {kind: size - shared[kind] for kind, size in replicated.items()}
    within = differences.pop("within a pass")
    assert differences == {"weights": 2 * more, "gradients": 4 * more, OPTIMIZER: 12 * more, "activations": 0}
    # Slices need a sum of dW each. A stage with several heads no longer keeps a sum while the next head runs.
    assert within == 4 * num_more * rows * 4096 if contents.spread else within <= 0


def test_heads_that_read_each_other_keep_gradient_sums_of_micro_batches_in_flight():
    settings = ["engine.kind=pipeline", "engine.num_stages=4", "model.head_kind=causal", "train.micro_batch_size=1"]
    for unembedding, num_sums in (("shared", 1), ("replicated", 2)):
        config = published_config("6.7b", 4, f"model.unembedding={unembedding}", *settings)
        one, three = (
            stage_memory(config, 1, StageContents(0, range(2), False, 32000), num_in_flight)["activations"]
            for num_in_flight in (1, 3)
        )
        layers = 2 * bytes_saved_by_layer(config) + 3 * 2 * 2 * 4096 * 4096  # with the outputs of heads and stage
        assert one == layers + num_sums * 4 * 32000 * 4096 and three == 3 * one
