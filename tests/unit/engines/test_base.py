"""The normalisation of the loss, by hand."""

import pytest
import torch

from megamtp.config import TrainConfig
from megamtp.data.loader import Batch
from megamtp.engines.base import compiles_layers, count_targets, loss_scales, on_device

CPU = torch.device("cpu")


def test_scales_make_a_mean_of_sums():
    """Over 8 valid targets, whatever is averaged over 4 ranks and 3 micro-batches; without targets there is no loss."""
    assert loss_scales([1.0, 0.5, 1.0], [8, 8, 0], averaged_ranks=4, accumulation=3) == [1.5, 0.75, 0.0]
    assert loss_scales([1.0], [8], averaged_ranks=1, accumulation=1) == [0.125]


def test_where_no_target_is_ignored_all_positions_count():
    """Two micro-batches of [2, 5] on each of three ranks, without asking the others."""
    batches = [Batch(torch.zeros(2, 5), torch.zeros(4, 2, 5)) for _ in range(2)]
    assert count_targets(batches, can_be_ignored=False, data_parallel_size=3, device=CPU) == [60] * 4


def test_all_micro_batches_go_to_the_device():
    tokens = torch.arange(3)
    batches = [Batch(tokens, tokens), Batch(tokens, tokens)]
    found = on_device(iter(batches), torch.device("meta"))
    assert [batch.inputs.device.type for batch in found] == ["meta", "meta"]


@pytest.mark.parametrize(
    ("setting", "device", "expected"),
    [(None, "cuda", True), (None, "cpu", False), (True, "cpu", True), (False, "cuda", False)],
)
def test_layers_are_compiled_on_gpus_unless_a_setting_decides(setting, device, expected):
    assert compiles_layers(TrainConfig(compile=setting), torch.device(device)) is expected
