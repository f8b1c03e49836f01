"""The planner against recorded steps of the emulated cluster, and what it says when a configuration does not fit."""

import dataclasses
import json
import statistics

import pytest

from megamtp.errors import InputError
from megamtp.model.cost import flops_per_token, parameters
from megamtp.planning.planner import CARDS, fitting, plan
from megamtp.planning.spread import best_cut
from tests.cases import ROOT, pipeline_config, published_config


def recorded() -> dict[str, tuple[dict, dict, str]]:
    """(a measured step of ours as one of 64 emulated ranks, its settings, the card) by name."""
    found = {}
    for path in sorted((ROOT / "tools/results").glob("overhead*.json")):
        content = json.loads(path.read_text())
        for result in content["results"]:
            if result["variant"] == "ours" and content["settings"]["ranks"] == 64:
                card = next(name for name in CARDS if name.upper() in content["circumstances"]["card"])
                found[f"{path.stem}-{result['size']}-n{result['heads']}"] = result, content["settings"], card
    return found


RECORDED = recorded()


def test_the_six_sizes_were_recorded():
    assert {(result["size"], result["heads"], card) for result, _, card in RECORDED.values()} == {
        (size, heads, card)
        for size in ("0.3b", "0.6b", "1.3b", "3b", "6.7b", "13b")
        for heads in (1, 4)
        for card in CARDS
    }


@pytest.mark.parametrize("name", RECORDED)
def test_prediction_is_within_a_tenth_of_the_recorded_step(name):
    result, settings, card = RECORDED[name]
    ranks, micro_batch = settings["ranks"], result["micro_batch"]
    config = published_config(
        result["size"],
        result["heads"],
        f"cluster.flat_bandwidth={settings['bandwidth']}",
        f"cluster.communication_sms={settings['SMs held']}",
        f"train.micro_batch_size={micro_batch}",
        f"train.global_batch_tokens={ranks * micro_batch * settings['T']}",
    )
    found = plan(config, ranks, CARDS[card])
    assert found.micro_batches == 1
    assert found.peak_bytes == pytest.approx(result["peak_bytes"], rel=0.1)
    seconds = statistics.median(result["milliseconds"]) / 1e3
    assert found.compute + found.exposed == pytest.approx(seconds, rel=0.1)


def test_more_ranks_take_shards_and_micro_batches_away():
    config = published_config("6.7b", 4, "train.micro_batch_size=1")
    few, many = (plan(config, ranks, CARDS["h100"]) for ranks in (64, 128))
    assert many.memory["optimizer"] == few.memory["optimizer"] / 2
    assert many.memory["activations"] == few.memory["activations"]
    assert few.micro_batches == 2 * many.micro_batches
    assert many.compute == few.compute / 2


def test_a_checkpoint_is_what_all_ranks_copy():
    """Twelve bytes a parameter, in equal shares."""
    found = plan(published_config("6.7b", 4), 64, CARDS["h100"])
    assert found.checkpoint_bytes == 12 * parameters(published_config("6.7b", 4).model)
    assert 64 * sum(found.host_memory.values()) == pytest.approx(found.checkpoint_bytes)
    assert found.host_memory["copy that a checkpoint is written from"] == found.memory["optimizer"]


def test_what_is_offloaded_moves_to_the_host_and_is_copied_all_the_same():
    kept, offloaded = (
        plan(published_config("6.7b", 4, *further), 64, CARDS["h100"])
        for further in ([], ["engine.offload_optimizer=true", "engine.offload_parameters=true"])
    )
    moved = sum(kept.memory[kind] for kind in ("weights", "gradients", "optimizer"))
    assert sum(offloaded.host_memory.values()) - sum(kept.host_memory.values()) == pytest.approx(moved)
    assert kept.peak_bytes - offloaded.peak_bytes == pytest.approx(moved)
    assert offloaded.checkpoint_bytes == kept.checkpoint_bytes
    alone = plan(published_config("0.3b", 4, "engine.offload_parameters=true"), 1, CARDS["h100"])
    assert alone.memory["gathered weights"] > 0  # the copies on the device


def test_slower_networks_are_exposed():
    fast, slow = (
        plan(published_config("6.7b", 4, f"cluster.flat_bandwidth={rate}"), 64, CARDS["h100"]) for rate in (400e9, 20e9)
    )
    assert slow.compute == fast.compute
    assert slow.exposed > 5 * fast.exposed


def test_fp8_losses_take_memory_for_time():
    plain, further, all_heads = (
        plan(published_config("6.7b", 4, *settings), 64, CARDS["h100"])
        for settings in ([], ["head_loss.precision=fp8", "head_loss.fp8_first_head=false"], ["head_loss.precision=fp8"])
    )
    weight, hidden, chunk = 2 * 32000 * 4096, 2 * 4096 * 4096, 8192 * 32000
    assert all_heads.peak_bytes - plain.peak_bytes == further.peak_bytes - plain.peak_bytes == weight + hidden + chunk
    assert all_heads.compute < further.compute < plain.compute


def test_the_nearest_configuration_that_fits_does_fit():
    config = published_config("13b", 4)
    assert plan(config, 8, CARDS["h100"]).peak_bytes > CARDS["h100"].memory_bytes
    words, changed, ranks = fitting(config, 8, CARDS["h100"])
    assert words == "train.micro_batch_size=1" and ranks == 8
    assert plan(changed, ranks, CARDS["h100"]).peak_bytes <= CARDS["h100"].memory_bytes


def test_a_pipelines_stages_add_up():
    few, many = (plan(pipeline_config("13b", 8), ranks, CARDS["h100"]) for ranks in (8, 64))
    for found in (few, many):
        assert found.peak_bytes == max(sum(stage.memory_bytes.values()) for stage in found.cut.stages)
        *others, last = (stage.end - stage.first for stage in found.cut.stages)
        assert sorted(others) == [5, 5, 5, 5, 5, 5, 6] and last == 4
    assert [stage.memory_bytes["optimizer"] for stage in few.cut.stages] == [
        pytest.approx(8 * stage.memory_bytes["optimizer"], abs=8) for stage in many.cut.stages
    ]
    assert few.micro_batches == 8 * many.micro_batches
    assert sum(many.host_memory.values()) == max(stage.memory_bytes["optimizer"] for stage in many.cut.stages)
    weights = sum(stage.memory_bytes["weights"] for stage in many.cut.stages)
    assert weights == 2 * parameters(pipeline_config("13b", 8).model)  # all heads are in the last stage: one copy
    assert many.compute * 8 == pytest.approx(few.compute)
    assert 0.1 * many.step_seconds < many.exposed < 0.3 * many.step_seconds


def test_a_pipelines_stages_take_as_long_as_their_flops_at_the_cards_usual_rate():
    found = plan(pipeline_config("6.7b", 8), 64, CARDS["h100"])
    tokens = found.micro_batches * 4096
    flops = flops_per_token(pipeline_config("6.7b", 8).model, 4096) * tokens / 8
    assert 450e12 < flops / found.compute < 650e12


def test_spread_losses_are_planned():
    whole, spread_losses = (
        plan(pipeline_config("6.7b", 8, *further), 64, CARDS["h100"]) for further in ([], ["engine.spread_losses=true"])
    )
    assert spread_losses.step_seconds < whole.step_seconds
    assert spread_losses.compute == pytest.approx(whole.compute, rel=0.01)
    assert spread_losses.peak_bytes > whole.peak_bytes  # more micro-batches are alive
    assert sum(stage.contents.rows for stage in spread_losses.cut.stages) == 32000


@pytest.mark.parametrize("further", [[], ["train.activation_checkpointing=true"]])
def test_a_run_with_the_planned_layers_spreads_losses_as_planned(further):
    """Rows and orders, and so memory: a run shares them out by FLOPs, for it does not know the card's rates."""
    config = pipeline_config("13b", 8, "model.vocab_size=128256", "engine.spread_losses=true", *further)
    planned = plan(config, 64, CARDS["h100"]).cut
    layers = [stage.num_layers for stage in planned.stages]
    run = best_cut(dataclasses.replace(config, engine=dataclasses.replace(config.engine, stage_layers=layers)), 8)
    assert [stage.contents for stage in planned.stages] == [stage.contents for stage in run.stages]
    assert [stage.memory_bytes for stage in planned.stages] == [stage.memory_bytes for stage in run.stages]
    assert planned.schedule.orders == run.schedule.orders
    assert sum(planned.costs) < 1.0 < sum(run.costs)  # seconds; FLOPs


def test_a_pipeline_that_does_not_fit_gets_more_stages_not_offloading():
    config = pipeline_config("13b", 2)
    assert plan(config, 2, CARDS["h100"]).peak_bytes > CARDS["h100"].memory_bytes
    words, changed, ranks = fitting(config, 4, CARDS["h100"])
    assert words == "train.micro_batch_size=1 train.activation_checkpointing=true engine.num_stages=4" and ranks == 4
    assert not changed.engine.offload_optimizer


@pytest.mark.parametrize(
    "setting",
    ["engine.kind=zero1", "engine.communication=deepspeed", "train.precision=fp32", "engine.head_schedule=deferred"],
)
def test_what_was_not_measured_is_not_planned(setting):
    with pytest.raises(InputError, match=f"{setting}.*not planned; expected"):
        plan(published_config("0.3b", 4, setting), 8, CARDS["h100"])
