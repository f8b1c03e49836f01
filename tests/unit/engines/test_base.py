"""The loss normalisation against values computed by hand."""

import pytest
import torch

from megamtp.config import TrainConfig
from megamtp.data.loader import Batch
from megamtp.engines.base import count_targets, layer_options, loss_scales, move_to_device

CPU = torch.device("cpu")


def test_loss_scales_give_the_mean_over_all_valid_targets():
    """They divide by 8 valid targets and undo averages over 4 ranks and 3 micro-batches. Without targets they are 0."""
    assert loss_scales([1.0, 0.5, 1.0], [8, 8, 0], num_averaged_ranks=4, num_micro_batches=3) == [1.5, 0.75, 0.0]
    assert loss_scales([1.0], [8], num_averaged_ranks=1, num_micro_batches=1) == [0.125]


def test_all_positions_count_if_no_target_can_be_ignored():
    """Two micro-batches of [2, 5] positions on each of three ranks, without communication."""
    batches = [Batch(torch.zeros(2, 5), torch.zeros(4, 2, 5)) for _ in range(2)]
    assert count_targets(batches, can_be_ignored=False, data_parallel_size=3, device=CPU) == [60] * 4


def test_all_micro_batches_move_to_the_device():
    tokens = torch.arange(3)
    batches = [Batch(tokens, tokens), Batch(tokens, tokens)]
    moved = move_to_device(iter(batches), torch.device("meta"))
    assert [batch.inputs.device.type for batch in moved] == ["meta", "meta"]


@pytest.mark.parametrize(
    ("setting", "device", "expected"),
    [(None, "cuda", True), (None, "cpu", False), (True, "cpu", True), (False, "cuda", False)],
)
def test_layers_are_compiled_on_gpus_by_default(setting, device, expected):
    assert layer_options(TrainConfig(compile=setting), torch.device(device)).compiled is expected
