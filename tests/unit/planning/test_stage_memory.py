"""The memory of pipeline stages against recorded measurements."""

import json

import pytest

from megamtp.planning.stage_memory import OPTIMIZER, StageContents, stage_memory
from tests.cases import ROOT, published_config


def recorded_pipelines() -> list[tuple[dict, dict]]:
    """(a pipeline whose stages were measured, the settings)"""
    contents = [json.loads(path.read_text()) for path in sorted((ROOT / "tools/results").glob("pipeline*.json"))]
    return [(result, content["settings"]) for content in contents for result in content["results"]]


def test_memory_of_recorded_stages_is_predicted():
    """All stages of all sizes, vocabularies and numbers of stages, of whole layers and with spread losses: within 5
    %.
    """
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
            "head_loss.chunk_rows=4096",  # the default when these were measured
        )
        spread = result["plan"] == "spread losses"
        for stage, peak in enumerate(result["peak_bytes"]):
            heads = result["heads_of_stages"][stage]
            own = range(sum(result["heads_of_stages"][:stage]), sum(result["heads_of_stages"][: stage + 1]))
            contents = StageContents(result["layers"][stage] - heads, own, stage == 0, result["rows"][stage], spread)
            found = stage_memory(config, settings["pipelines"], contents, result["alive"][stage])
            needed = sum(size for kind, size in found.items() if kind != OPTIMIZER)
            assert needed == pytest.approx(peak, rel=0.05), (result["plan"], contents)
            num_stages += 1
    assert num_stages == 312
