"""The planner's predictions against recorded steps of the emulated cluster, and its report if nothing fits."""

import dataclasses
import json
import statistics

import pytest

from megamtp.errors import InputError
from megamtp.model.cost import flops_per_token, num_head_parameters, num_layer_parameters, num_parameters
from megamtp.planning.gpus import GPUS
from megamtp.planning.memory import gathered_bytes
from megamtp.planning.planner import nearest_fitting, plan
from megamtp.planning.spread import best_partition
from tests.cases import ROOT, pipeline_config, published_config


def recorded(variant: str) -> dict[str, tuple[dict, dict, str]]:
    """Returns (a step measured on one of 64 emulated ranks, its settings, the GPU) by name."""
    steps = {}
    for path in sorted((ROOT / "tools/results").glob("overhead*.json")):
        content = json.loads(path.read_text())
        for result in content["results"]:
            if result["variant"] == variant and content["settings"]["ranks"] == 64:
                gpu = next(name for name in GPUS if name.upper() in content["circumstances"]["card"])
                steps[f"{path.stem}-{result['size']}-n{result['heads']}"] = result, content["settings"], gpu
    return steps


RECORDED, RECORDED_IN_FLOAT8 = recorded("ours"), recorded("ours all fp8")


SIZES = "0.3b", "0.6b", "1.3b", "3b", "6.7b", "13b"


def test_all_sizes_and_gpus_are_recorded():
    assert {(result["size"], result["heads"], gpu) for result, _, gpu in RECORDED.values()} == {
        (size, heads, gpu) for size in SIZES for heads in (1, 4) for gpu in GPUS
    }


def test_steps_in_fp8_are_recorded():
    recorded_cases = {(result["size"], result["heads"]) for result, _, _ in RECORDED_IN_FLOAT8.values()}
    assert recorded_cases >= {("1.3b", 1), ("1.3b", 4), ("13b", 1), ("13b", 4)}


@pytest.mark.parametrize("name", RECORDED)
def test_prediction_is_within_10_percent_of_the_recorded_step(name):
    compare(*RECORDED[name])


@pytest.mark.parametrize("name", RECORDED_IN_FLOAT8)
def test_prediction_is_within_10_percent_of_the_step_recorded_in_fp8(name):
    compare(*RECORDED_IN_FLOAT8[name], "train.precision=fp8")


def compare(result: dict, settings: dict, gpu: str, *further: str) -> None:
    """Compares the predicted memory and time with a recorded step."""
    ranks, micro_batch = settings["ranks"], result["micro_batch"]
    config = published_config(
        result["size"],
        result["heads"],
        f"cluster.flat_bandwidth={settings['bandwidth']}",
        f"cluster.communication_sms={settings['SMs held']}",
        f"train.micro_batch_size={micro_batch}",
        f"train.global_batch_tokens={ranks * micro_batch * settings['T']}",
        *further,
    )
    predicted = plan(config, ranks, GPUS[gpu])
    assert predicted.num_micro_batches == 1
    assert predicted.peak_bytes == pytest.approx(result["peak_bytes"], rel=0.1)
    seconds = statistics.median(result["milliseconds"]) / 1e3
    assert predicted.compute_seconds + predicted.exposed_seconds == pytest.approx(seconds, rel=0.1)


def test_more_ranks_have_smaller_shards_and_fewer_micro_batches():
    config = published_config("6.7b", 4, "train.micro_batch_size=1")
    few, many = (plan(config, ranks, GPUS["h100"]) for ranks in (64, 128))
    assert many.memory["optimizer"] == few.memory["optimizer"] / 2
    assert many.memory["activations"] == few.memory["activations"]
    assert few.num_micro_batches == 2 * many.num_micro_batches
    assert many.compute_seconds == few.compute_seconds / 2


def test_checkpoint_has_12_bytes_per_parameter_from_all_ranks():
    predicted = plan(published_config("6.7b", 4), 64, GPUS["h100"])
    assert predicted.checkpoint_bytes == 12 * num_parameters(published_config("6.7b", 4).model)
    assert 64 * sum(predicted.host_memory.values()) == pytest.approx(predicted.checkpoint_bytes)
    assert predicted.host_memory["copy for the checkpoint"] == predicted.memory["optimizer"]


def test_offloaded_state_moves_to_cpu_memory_and_is_still_copied_for_checkpoints():
    kept, offloaded = (
        plan(published_config("6.7b", 4, *further), 64, GPUS["h100"])
        for further in ([], ["engine.offload_optimizer=true", "engine.offload_parameters=true"])
    )
    moved = sum(kept.memory[kind] for kind in ("weights", "gradients", "optimizer"))
    assert sum(offloaded.host_memory.values()) - sum(kept.host_memory.values()) == pytest.approx(moved)
    assert kept.peak_bytes - offloaded.peak_bytes == pytest.approx(moved)
    assert offloaded.checkpoint_bytes == kept.checkpoint_bytes
    alone = plan(published_config("0.3b", 4, "engine.offload_parameters=true"), 1, GPUS["h100"])
    assert alone.memory["gathered weights"] > 0  # copies on the GPU


def test_slower_networks_expose_more_communication():
    fast, slow = (
        plan(published_config("6.7b", 4, f"cluster.flat_bandwidth={rate}"), 64, GPUS["h100"]) for rate in (400e9, 20e9)
    )
    assert slow.compute_seconds == fast.compute_seconds
    assert slow.exposed_seconds > 5 * fast.exposed_seconds


def test_fp8_losses_are_faster_and_need_more_memory():
    plain, further, all_heads = (
        plan(published_config("6.7b", 4, *settings), 64, GPUS["h100"])
        for settings in ([], ["head_loss.precision=fp8", "head_loss.fp8_first_head=false"], ["head_loss.precision=fp8"])
    )
    weight, hidden, chunk = 2 * 32000 * 4096, 2 * 4096 * 4096, 8192 * 32000
    assert all_heads.peak_bytes - plain.peak_bytes == further.peak_bytes - plain.peak_bytes == weight + hidden + chunk
    assert all_heads.compute_seconds < further.compute_seconds < plain.compute_seconds


def test_layers_in_fp8_gather_a_byte_per_weight_and_keep_a_copy_of_their_shards():
    bf16, fp8 = (
        plan(published_config("6.7b", 4, f"train.precision={precision}", "head_loss.precision=fp8"), 64, GPUS["h200"])
        for precision in ("bf16", "fp8")
    )
    layer, num_layers, tokens = num_layer_parameters(published_config("6.7b", 4).model), 32, 2 * 4096
    assert bf16.memory["gathered weights"] - fp8.memory["gathered weights"] == 3 * layer
    assert fp8.memory["weights"] - bf16.memory["weights"] == pytest.approx(num_layers * layer / 64)
    # Two norms' outputs and the MLP's hidden elements lose a byte each; attended values are also kept in 8 bits, and
    # queries and keys also before their rotation. 28 trunk layers and one head at a time keep them.
    saved = 29 * tokens * (2 * 4096 + 11008 - 4096 - 2 * 2 * 4096)
    assert bf16.memory["activations"] - fp8.memory["activations"] == saved
    for kind in ("gradients", "optimizer", "gradients in flight", "head loss"):
        assert fp8.memory[kind] == bf16.memory[kind]
    assert fp8.checkpoint_bytes == bf16.checkpoint_bytes
    assert fp8.compute_seconds < 0.75 * bf16.compute_seconds  # products take half as long, attention as long as before


def test_slow_networks_expose_less_communication_of_weights_in_fp8():
    """Two gathers and a reduction take 1 + 1 + 2 bytes per weight in fp8, and 2 + 2 + 2 in bf16.

    Computation hides little of them in such a network, so the ratio is near 2/3.
    """
    bf16, fp8 = (
        plan(published_config("6.7b", 4, "cluster.flat_bandwidth=5e9", f"train.precision={kind}"), 64, GPUS["h200"])
        for kind in ("bf16", "fp8")
    )
    assert 0.6 < fp8.exposed_seconds / bf16.exposed_seconds < 0.8


@pytest.mark.parametrize("engine", [[], ["engine.kind=pipeline", "engine.num_stages=4"]], ids=["zero3", "pipeline"])
def test_small_micro_batches_wait_for_the_cpu_longer_in_fp8(engine):
    """Their time does not depend on the number of tokens."""
    times = {}
    for precision in ("bf16", "fp8"):
        for length in (64, 128):
            settings = [f"train.sequence_length={length}", f"train.precision={precision}", "train.micro_batch_size=1"]
            planned = plan(published_config("0.3b", 4, *settings, *engine), 64, GPUS["h200"])
            times[precision, length] = planned.compute_seconds / planned.num_micro_batches
        assert times[precision, 64] == pytest.approx(times[precision, 128])
    assert times["fp8", 64] > times["bf16", 64]


def test_pipelines_send_no_weights_in_fp8():
    gpu = GPUS["h200"]
    bf16, fp8 = (
        plan(pipeline_config("13b", 8, f"train.precision={kind}", "engine.stage_layers=[5,5,5,5,5,5,5,5]"), 64, gpu)
        for kind in ("bf16", "fp8")
    )
    layer = num_layer_parameters(pipeline_config("13b", 8).model)
    for stage, other in zip(fp8.partition.stages, bf16.partition.stages, strict=True):
        assert stage.memory_bytes["weights"] - other.memory_bytes["weights"] == 5 * layer
        assert stage.memory_bytes["gradients"] == other.memory_bytes["gradients"]
    assert fp8.optimizer_seconds == bf16.optimizer_seconds
    assert fp8.step_seconds < 0.8 * bf16.step_seconds  # products take half as long, attention as long as before


def test_heads_of_a_users_own_stay_in_bf16():
    head_kind = "model.head_kind=tests.distributed.test_own_head:NarrowHead"
    config = published_config("6.7b", 4, head_kind, "train.precision=fp8")
    layer, head = num_layer_parameters(config.model), num_head_parameters(config.model, 0)
    assert gathered_bytes(config) == (layer, [2 * head] * 4)
    memory = plan(config, 64, GPUS["h200"]).memory
    assert memory["weights"] == pytest.approx((2 * num_parameters(config.model) + 28 * layer) / 64)


def test_nearest_fitting_configuration_fits():
    config = published_config("13b", 4)
    assert plan(config, 8, GPUS["h100"]).peak_bytes > GPUS["h100"].memory_bytes
    alternative, changed, ranks = nearest_fitting(config, 8, GPUS["h100"])
    assert alternative == "train.micro_batch_size=1" and ranks == 8
    assert plan(changed, ranks, GPUS["h100"]).peak_bytes <= GPUS["h100"].memory_bytes


def test_stages_of_a_pipeline_add_up():
    few, many = (plan(pipeline_config("13b", 8), ranks, GPUS["h100"]) for ranks in (8, 64))
    for predicted in (few, many):
        stages = predicted.partition.stages
        assert predicted.peak_bytes == max(sum(stage.memory_bytes.values()) for stage in stages)
        *others, last = (stage.num_layers for stage in stages)
        assert sorted(others) == [5, 5, 5, 5, 5, 5, 6] and last == 4
    assert [stage.memory_bytes["optimizer"] for stage in few.partition.stages] == [
        pytest.approx(8 * stage.memory_bytes["optimizer"], abs=8) for stage in many.partition.stages
    ]
    assert few.num_micro_batches == 8 * many.num_micro_batches
    assert sum(many.host_memory.values()) == max(stage.memory_bytes["optimizer"] for stage in many.partition.stages)
    weights = sum(stage.memory_bytes["weights"] for stage in many.partition.stages)
    assert weights == 2 * num_parameters(pipeline_config("13b", 8).model)  # only the last stage has heads: one copy
    assert many.compute_seconds * 8 == pytest.approx(few.compute_seconds)
    assert 0.1 * many.step_seconds < many.exposed_seconds < 0.3 * many.step_seconds


def test_stages_of_a_pipeline_compute_at_a_realistic_rate():
    predicted = plan(pipeline_config("6.7b", 8), 64, GPUS["h100"])
    tokens = predicted.num_micro_batches * 4096
    flops = flops_per_token(pipeline_config("6.7b", 8).model, 4096) * tokens / 8
    assert 450e12 < flops / predicted.compute_seconds < 650e12


def test_spread_losses_are_planned():
    whole, spread_losses = (
        plan(pipeline_config("6.7b", 8, *further), 64, GPUS["h100"]) for further in ([], ["engine.spread_losses=true"])
    )
    assert spread_losses.step_seconds < whole.step_seconds
    assert spread_losses.compute_seconds == pytest.approx(whole.compute_seconds, rel=0.01)
    assert spread_losses.peak_bytes > whole.peak_bytes  # more micro-batches are in flight
    assert sum(stage.contents.rows for stage in spread_losses.partition.stages) == 32000


@pytest.mark.parametrize("further", [[], ["train.activation_checkpointing=true"], ["train.precision=fp8"]])
def test_run_with_the_planned_layers_has_the_planned_rows_orders_and_memory(further):
    """A run assigns rows by FLOPs, because it does not know the GPU's rates. The plan must do the same."""
    config = pipeline_config("13b", 8, "model.vocab_size=128256", "engine.spread_losses=true", *further)
    planned = plan(config, 64, GPUS["h100"]).partition
    layers = [stage.num_layers for stage in planned.stages]
    run = best_partition(dataclasses.replace(config, engine=dataclasses.replace(config.engine, stage_layers=layers)), 8)
    assert [stage.contents for stage in planned.stages] == [stage.contents for stage in run.stages]
    assert [stage.memory_bytes for stage in planned.stages] == [stage.memory_bytes for stage in run.stages]
    assert planned.schedule.orders == run.schedule.orders
    assert sum(planned.costs) < 1.0 < sum(run.costs)  # seconds; FLOPs


def test_pipeline_that_does_not_fit_gets_more_stages_instead_of_offloading():
    config = pipeline_config("13b", 2)
    assert plan(config, 2, GPUS["h100"]).peak_bytes > GPUS["h100"].memory_bytes
    alternative, changed, ranks = nearest_fitting(config, 4, GPUS["h100"])
    assert (
        alternative == "train.micro_batch_size=1 train.activation_checkpointing=true engine.num_stages=4" and ranks == 4
    )
    assert not changed.engine.offload_optimizer


@pytest.mark.parametrize(
    "setting",
    ["engine.kind=zero1", "engine.communication=deepspeed", "train.precision=fp32", "engine.head_schedule=deferred"],
)
def test_unmeasured_settings_are_not_planned(setting):
    with pytest.raises(InputError, match=f"{setting}.*not planned; expected"):
        plan(published_config("0.3b", 4, setting), 8, GPUS["h100"])


def test_unembeddings_of_heads_are_gathered_and_reduced_with_their_heads():
    settings = ["model.match_parameters=false", "cluster.flat_bandwidth=20e9"]
    shared, replicated = (
        plan(published_config("6.7b", 4, f"model.unembedding={unembedding}", *settings), 64, GPUS["h100"])
        for unembedding in ("shared", "replicated")
    )
    vocabulary = 2 * 32000 * 4096
    more = 3 * (32000 + 1) * 4096
    assert replicated.memory["weights"] - shared.memory["weights"] == pytest.approx(2 * more / 64)
    assert replicated.memory["gathered weights"] - shared.memory["gathered weights"] == vocabulary
    assert replicated.memory["head loss"] == shared.memory["head loss"]  # one sum of dW at a time
    assert replicated.compute_seconds == shared.compute_seconds
    assert replicated.exposed_seconds > shared.exposed_seconds
