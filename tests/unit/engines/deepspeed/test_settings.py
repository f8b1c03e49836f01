"""The configuration for DeepSpeed: settings that are always set, passed through, or refused."""

import pytest

from megamtp.engines.deepspeed.settings import REFUSED, deepspeed_config
from megamtp.errors import InputError
from tests.cases import small_config


@pytest.mark.parametrize("kind", ["zero1", "zero3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_settings_with_unwanted_defaults_are_always_set(kind, precision):
    settings = deepspeed_config(small_config(2, 3, engine__kind=kind, train__precision=precision), data_parallel_size=2)
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["gradient_clipping"] == 1.0
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["communication_data_type"] == precision
    assert settings["timers"]["throughput"]["enabled"] is False
    assert settings["bf16"]["enabled"] == (precision == "bf16")
    assert settings["zero_optimization"]["stage"] == int(kind[-1])


def test_pipeline_uses_zero1_with_fp32_sums_and_reduces_at_the_end():
    config = small_config(2, 3, engine__kind="pipeline", engine__num_stages=2, train__precision="bf16")
    settings = deepspeed_config(config, data_parallel_size=2)
    zero = settings["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"], zero["contiguous_gradients"]) == (1, False, False)
    assert settings["bf16"] == {"enabled": True, "immediate_grad_update": True}
    assert settings["gradient_accumulation_steps"] == 3


def test_clipping_can_be_turned_off():
    assert deepspeed_config(small_config(optimizer__gradient_clipping=0), 2)["gradient_clipping"] == 0


def test_reduce_dtype_sets_the_dtype_of_reductions():
    config = small_config(train__precision="bf16", engine__reduce_dtype="fp32")
    assert deepspeed_config(config, 2)["communication_data_type"] == "fp32"


def test_offload_is_passed_through():
    config = small_config(engine__offload_optimizer=True, engine__offload_parameters=True)
    zero = deepspeed_config(config, 2)["zero_optimization"]
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu"}


def test_other_settings_are_passed_through_at_every_level():
    config = small_config(
        engine__deepspeed__wall_clock_breakdown=True, engine__deepspeed__zero_optimization__sub_group_size=1000
    )
    settings = deepspeed_config(config, 2)
    assert settings["wall_clock_breakdown"] is True
    assert settings["zero_optimization"]["sub_group_size"] == 1000
    assert settings["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    "name", ["gradient_clipping", "zero_optimization.stage", "bf16.enabled", "data_types.grad_accum_dtype"]
)
def test_conflicting_settings_are_refused(name):
    config = small_config(**{f"engine__deepspeed__{name.replace('.', '__')}": 1})
    with pytest.raises(InputError, match=rf"engine\.deepspeed\.{name} conflicts"):
        deepspeed_config(config, 2)


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_settings_are_refused_with_a_reason(name):
    with pytest.raises(InputError) as error:
        deepspeed_config(small_config(**{f"engine__deepspeed__{name.replace('.', '__')}": True}), 2)
    assert name in str(error.value)
    assert REFUSED[name] in str(error.value)
