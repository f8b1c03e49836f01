"""ZeroEngine's steps, with a stub in place of DeepSpeed's engine."""

import contextlib
from types import SimpleNamespace

import torch

from megamtp.engines.zero import ZeroEngine
from tests.cases import small_config


def test_all_micro_batches_are_copied_to_the_device_before_the_first_pass():
    """A later copy would wait for queued GPU work."""
    events, config = [], small_config(1)
    n = config.model.num_future_tokens

    class Batch(SimpleNamespace):
        def to(self, device: torch.device) -> "Batch":
            events.append(f"copied {self.inputs}")
            return self

    class Engine(SimpleNamespace):
        def __call__(self, inputs, *_):
            events.append(f"ran {inputs}")
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
    zero = ZeroEngine.__new__(ZeroEngine)  # without its constructor, which calls DeepSpeed
    zero.deepspeed_engine, zero.communication, zero.world_size, zero.config, zero.device = (
        engine,
        None,
        1,
        config,
        torch.device("cpu"),
    )
    zero.head_hooks = SimpleNamespace(discard_gradients_on_error=contextlib.nullcontext)
    zero.train_batch(
        [Batch(inputs=index, targets=None, documents=None, following=None) for index in range(2)], [8] * n, 1e-3
    )
    assert events == ["copied 0", "copied 1", "ran 0", "ran 1"]
