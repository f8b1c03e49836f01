"""ZeroEngine's steps, without an engine below them."""

import contextlib
from types import SimpleNamespace

import torch

from megamtp.engines.zero import ZeroEngine
from tests.cases import small_config


def test_all_micro_batches_are_on_the_device_before_the_first_pass():
    """The copy of one would wait for the passes that the device still has to run."""
    done, config = [], small_config(1)
    n = config.model.num_future_tokens

    class Batch(SimpleNamespace):
        def to(self, device: torch.device) -> "Batch":
            done.append(f"copied {self.inputs}")
            return self

    class Engine(SimpleNamespace):
        def __call__(self, inputs, *_):
            done.append(f"passed {inputs}")
            return None, torch.zeros(n)

    def nothing(*_):
        return None

    engine = Engine(
        train=nothing,
        set_gradient_accumulation_boundary=nothing,
        backward=nothing,
        step=nothing,
        was_step_applied=nothing,
        get_global_grad_norm=lambda: 1.0,
        optimizer=SimpleNamespace(param_groups=[]),
    )
    zero = ZeroEngine.__new__(ZeroEngine)  # without an engine of DeepSpeed's
    zero.engine, zero.traffic, zero.world_size, zero.config, zero.device = engine, None, 1, config, torch.device("cpu")
    zero.head_phase = SimpleNamespace(whole_or_nothing=contextlib.nullcontext)
    zero.train_batch([Batch(inputs=index, targets=None, documents=None) for index in range(2)], [8] * n, 1e-3)
    assert done == ["copied 0", "copied 1", "passed 0", "passed 1"]
