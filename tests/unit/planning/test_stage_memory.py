"""The memory of pipeline stages against recorded measurements."""

import json

import pytest

from megamtp.planning.stage_memory import OPTIMIZER, StageContents, stage_memory
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
