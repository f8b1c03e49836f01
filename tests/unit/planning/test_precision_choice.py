"""fp8 is compared with bf16 where the planner knows the GPU and the engine."""

import pytest

from megamtp.planning.gpus import GPUS
from megamtp.planning.planner import plan
from megamtp.planning.precision_choice import describe_slow_float8, with_bf16
from tests.cases import published_config

SHORT = ["train.micro_batch_size=1", "train.sequence_length=64"]  # the CPU needs longer than the GPU


def test_only_the_precision_changes():
    config = published_config("0.3b", 4, "train.precision=fp8")
    changed, setting = with_bf16(config)
    assert changed == published_config("0.3b", 4, setting)
    assert changed.resolved_head_loss.precision == "bf16"


def test_what_has_no_effect_in_bf16_changes_too():
    changed, settings = with_bf16(published_config("0.3b", 4, "train.precision=fp8", "head_loss.fp8_first_head=false"))
    assert settings == "train.precision=bf16 head_loss.fp8_first_head=true"
    assert changed == published_config("0.3b", 4, *settings.split())


@pytest.mark.parametrize("engine", [[], ["engine.kind=pipeline", "engine.num_stages=4"]], ids=["zero3", "pipeline"])
def test_slow_fp8_is_described(engine):
    fp8, bf16 = (published_config("0.3b", 4, f"train.precision={kind}", *SHORT, *engine) for kind in ("fp8", "bf16"))
    ratio = plan(bf16, 64, GPUS["h200"]).step_seconds / plan(fp8, 64, GPUS["h200"]).step_seconds
    assert describe_slow_float8(fp8, 64, "NVIDIA H200") == (
        "train.precision=fp8 on NVIDIA H200: train.precision=bf16 is predicted to be faster: "
        f"{ratio:.3f} times the step time"
    )


@pytest.mark.parametrize(
    ("size", "settings", "device_name"),
    [
        ("6.7b", ["train.precision=fp8"], "NVIDIA H200"),  # is faster
        ("0.3b", ["train.precision=fp8", *SHORT], "NVIDIA L40S"),
        ("0.3b", ["train.precision=bf16", "head_loss.precision=fp8", *SHORT], "NVIDIA H200"),
        ("0.3b", ["train.precision=fp8", "engine.kind=zero1", *SHORT], "NVIDIA H200"),
    ],
)
def test_nothing_is_said_of_fast_or_unplanned_runs(size, settings, device_name):
    assert describe_slow_float8(published_config(size, 4, *settings), 64, device_name) is None
