"""A user-defined optimizer, known only to this file: training, checkpoints, resuming and conversion."""

from pathlib import Path

import pytest
import torch

from megamtp.checkpoint import canonical, formats, runs, store
from megamtp.checkpoint.tensors import read_tensor
from megamtp.errors import CheckpointError, InputError
from megamtp.optimizers.base import OptimizerKind
from megamtp.optimizers.kinds import OPTIMIZERS
from megamtp.planning.gpus import GPUS
from megamtp.planning.planner import plan
from tests.cases import small_config
from tests.distributed.test_checkpoints import BOUND, FURTHER_STEPS, MICRO_BATCHES, STEPS, _train
from tests.ranks import run_ranks
from tests.reference import reference_model, reference_step
from tests.saved import load_weights, save

MOMENTUM = 0.5


class Momentum(torch.optim.Optimizer):
    """velocity = MOMENTUM * velocity + gradient; weights -= lr * velocity."""

    def __init__(self, parameters, lr: float):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                MomentumKind.prepare(state, parameter)
                state["step"] += 1
                state["velocity"].mul_(MOMENTUM).add_(parameter.grad)
                parameter.sub_(state["velocity"], alpha=group["lr"])


class MomentumKind(OptimizerKind):
    tensors = ("velocity",)

    @classmethod
    def make(cls, settings, parameters, shapes):
        return Momentum(list(parameters.values()), settings.lr)


KIND = {"optimizer__kind": f"{__name__}:MomentumKind", "model__num_future_tokens": 3, "optimizer__gradient_clipping": 0}
PIPELINE = {"engine__kind": "pipeline", "engine__num_stages": 2, "engine__stage_layers": [3, 2]}


def _saved(directory: str, data_parallel_size: int, settings: dict) -> list[list[float]]:
    """Saves a checkpoint; returns the losses of the steps after it."""
    from megamtp.engines.build import build_engine

    config = small_config(
        data_parallel_size, MICRO_BATCHES // data_parallel_size, run__directory=directory, **KIND | settings
    )
    engine = build_engine(config)
    _train(config, engine, range(STEPS))
    save(config, engine, STEPS)
    return _train(config, engine, range(STEPS, STEPS + FURTHER_STEPS))


def _resumed(directory: str, data_parallel_size: int, settings: dict) -> list[list[float]]:
    from megamtp.engines.build import build_engine

    config = small_config(data_parallel_size, MICRO_BATCHES // data_parallel_size, **KIND | settings)
    engine = build_engine(config)
    engine.load(store.newest_checkpoint(Path(directory)))
    return _train(config, engine, range(STEPS, STEPS + FURTHER_STEPS))


def expected_weights() -> dict[str, torch.Tensor]:
    """Returns the weights after STEPS steps, computed in float64."""
    from tests.cases import global_batch

    config = small_config(1, MICRO_BATCHES, **KIND)
    model, velocity = reference_model(config), {}
    for step in range(STEPS):
        gradients = reference_step(config, model, global_batch(config, step, MICRO_BATCHES)).gradients
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                velocity[name] = MOMENTUM * velocity.get(name, 0) + gradients[name]
                parameter -= 1e-2 * velocity[name]
    return dict(model.named_parameters())


@pytest.mark.parametrize(
    ("ranks", "data_parallel_size", "settings"),
    [
        (2, 2, {"engine__kind": "zero3"}),
        (2, 1, PIPELINE),
        (2, 2, {"engine__kind": "zero1", "train__precision": "fp32"}),
    ],
)
def test_trains_resumes_with_other_engines_and_converts(ranks, data_parallel_size, settings, tmp_path):
    expected = torch.tensor(run_ranks(_saved, ranks, str(tmp_path / "run"), data_parallel_size, settings)[0])
    _, weights = load_weights(store.newest_checkpoint(tmp_path / "run"))
    for name, tensor in expected_weights().items():
        torch.testing.assert_close(weights[name].double(), tensor, rtol=1e-4, atol=1e-6)
    losses = torch.tensor(run_ranks(_resumed, 1, str(tmp_path / "run"), 1, {"engine__kind": "zero3"})[0])
    if settings["engine__kind"] != "pipeline":
        torch.testing.assert_close(losses, expected, rtol=BOUND, atol=0)
    contents = formats.read(tmp_path / "run")
    assert contents.state.optimizer.tensors == ("velocity",) and contents.state.optimizer.steps == (STEPS,)
    canonical.write(contents, tmp_path / "canonical")
    runs.write(canonical.read(tmp_path / "canonical"), tmp_path / "again")
    again = formats.read(tmp_path / "again")
    for kind in ("weight", "velocity"):
        for name in weights:
            assert torch.equal(read_tensor(again.sources[kind], name), read_tensor(contents.sources[kind], name))
    assert max(read_tensor(again.sources["velocity"], name).abs().max() for name in weights) > 0


def _loaded_by_adamw(directory: str) -> str:
    from megamtp.engines.build import build_engine

    engine = build_engine(small_config(1, MICRO_BATCHES, model__num_future_tokens=3))
    with pytest.raises(CheckpointError) as error:
        engine.load(store.newest_checkpoint(Path(directory)))
    return str(error.value)


def test_resuming_with_another_optimizer_is_refused(tmp_path):
    run_ranks(_saved, 1, str(tmp_path / "run"), 1, {"engine__kind": "zero3"})
    (message,) = run_ranks(_loaded_by_adamw, 1, str(tmp_path / "run"))
    assert "was trained with optimizer.kind=" in message and "not adamw; change it back" in message


def test_the_plan_counts_the_optimizers_state():
    adamw = small_config(2, 1, train__precision="bf16")
    own = small_config(2, 1, train__precision="bf16", **{"optimizer__kind": KIND["optimizer__kind"]})
    with_adamw, with_own = (plan(config, 2, GPUS["h100"]) for config in (adamw, own))
    assert with_own.checkpoint_bytes * 3 == with_adamw.checkpoint_bytes * 2
    assert with_own.memory["optimizer"] * 3 == with_adamw.memory["optimizer"] * 2


def test_an_unknown_kind_is_named_in_the_error():
    from megamtp.engines.check import check_engine

    names = " or ".join(OPTIMIZERS)
    with pytest.raises(InputError, match=rf"^optimizer\.kind=adam; expected {names}, or MODULE:CLASS of your own$"):
        check_engine(small_config(1, 1, optimizer__kind="adam"), 0, 1)
