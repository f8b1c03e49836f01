"""DeepSpeed's universal form: its engines load what we write, and we read what its converter makes of its engines'
checkpoints.
"""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megamtp.checkpoint import universal
from megamtp.checkpoint.contents import WEIGHT, Contents, resolve_defaults
from megamtp.checkpoint.tensors import read_tensor
from megamtp.errors import CheckpointError
from tests.cases import global_batch, own_share, small_config
from tests.checkpoints import MOMENTS, SMALL, STATE, contents, random_model, with_moments
from tests.ranks import run_ranks

ENGINES = {
    "zero3": {"engine__kind": "zero3"},
    "zero1": {"engine__kind": "zero1"},
    "bf16": {"engine__kind": "zero1", "train__precision": "bf16"},
    "pipeline": {"engine__kind": "pipeline", "engine__num_stages": 2, "engine__stage_layers": [3, 2], "world_size": 1},
}


def _state(engine) -> dict[str, dict[str, torch.Tensor]]:
    """The whole fp32 weights and moments of this rank's parameters, by kind and name."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    named = list(engine.model.named_parameters())
    found = {WEIGHT: {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in named}}
    for kind in MOMENTS:
        found[kind] = {name: safe_get_full_optimizer_state(parameter, kind).clone() for name, parameter in named}
    return found


def _one_step(engine, config) -> None:
    from megamtp.engines.base import count_targets

    size = engine.data_parallel_size
    own = own_share(global_batch(config, 0, size), engine.data_parallel_rank, size)
    engine.train_batch(own, count_targets(own, True, size, engine.device), 1e-2)


def _loaded(folder: str) -> list[tuple]:
    from megamtp.engines.build import build_engine

    found = []
    for settings in ENGINES.values():
        config = small_config(**settings)
        engine = build_engine(config)
        _one_step(engine, config)  # so that there is an optimizer state to be replaced
        engine.deepspeed_engine._config.load_universal_checkpoint = True
        path, client = engine.deepspeed_engine.load_checkpoint(folder)
        assert path is not None
        steps = {float(state["step"]) for state in engine.deepspeed_engine.optimizer.optimizer.state.values()}
        found.append((_state(engine), steps, engine.deepspeed_engine.global_steps, client["megamtp"]["step"]))
    return found


def test_every_engine_of_deepspeed_loads_what_we_write(tmp_path):
    config = small_config()
    expected = with_moments(config.model)
    universal.write(expected, tmp_path / "universal")
    for rank in run_ranks(_loaded, 2, str(tmp_path / "universal")):
        for state, steps, global_steps, step in rank:
            assert (steps, global_steps, step) == ({7.0}, 9, 9)
            for kind, tensors in state.items():
                assert tensors
                for name, tensor in tensors.items():
                    assert torch.equal(tensor, read_tensor(expected.sources[kind], name)), (kind, name)


def _saved(folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """Two steps with ZeRO-1 and with ZeRO-3, saved; what they come to."""
    from megamtp.engines.build import build_engine

    for name in ("zero1", "zero3"):
        config = small_config(**ENGINES[name])
        engine = build_engine(config)
        _one_step(engine, config)
        _one_step(engine, config)
        engine.deepspeed_engine.save_checkpoint(f"{folder}/{name}", tag="engine")
    return _state(engine)  # ZeRO-3's, for DeepSpeed's ZeRO-1 does not tell its moments here


def test_what_deepspeeds_converter_makes_is_read(tmp_path):
    from deepspeed.checkpoint.ds_to_universal import main

    config = small_config()
    state = run_ranks(_saved, 2, str(tmp_path))[0]
    for name, tolerance in (("zero3", 0), ("zero1", 1e-5)):
        folder = tmp_path / name
        options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
        main(
            argparse.Namespace(
                input_folder=str(folder / "engine"),
                output_folder=str(folder / "converted"),
                inject_missing_state=True,
                **options,
            )
        )
        with pytest.raises(CheckpointError, match="does not describe its model; expected --config"):
            universal.read(folder)
        found = universal.read(folder, config.model)
        assert found.state.optimizer.steps == (found.step,) == (2,)
        for kind, tensors in state.items():
            assert found.sources[kind].shapes.keys() == tensors.keys()
            for parameter, tensor in tensors.items():
                assert tensor.any()
                torch.testing.assert_close(
                    read_tensor(found.sources[kind], parameter), tensor, rtol=tolerance, atol=tolerance
                )


@pytest.fixture
def written(tmp_path) -> Path:
    universal.write(with_moments(SMALL), tmp_path / "universal")
    return tmp_path / "universal"


def check_equal(found: Contents, expected: Contents) -> None:
    assert (found.model, found.step, found.state, found.sequence_length) == (resolve_defaults(SMALL), 9, STATE, 64)
    for kind, source in expected.sources.items():
        assert all(
            torch.equal(read_tensor(found.sources[kind], name), read_tensor(source, name)) for name in source.shapes
        )


def test_back_bit_for_bit(written):
    check_equal(universal.read(written), with_moments(SMALL))
    check_equal(universal.read(written / "global_step9"), with_moments(SMALL))


def test_a_wrong_tensor_is_named(written):
    zero = written / "global_step9/zero"
    torch.save({"param": torch.zeros(47, 32)}, zero / "trunk.1.mlp.up.weight/exp_avg.pt")
    with pytest.raises(
        CheckpointError, match=r"tensor trunk.1.mlp.up.weight has shape \[47, 32\], expected \[48, 32\]"
    ):
        universal.read(written)
    (zero / "heads.0.mlp_norm.weight").rename(zero / "heads.7.mlp_norm.weight")
    with pytest.raises(CheckpointError, match=r"no tensor heads.0.mlp_norm.weight"):
        universal.read(written)
    (zero / "heads.0.mlp_norm.weight").mkdir()
    with pytest.raises(CheckpointError, match=r"unknown tensor heads.7.mlp_norm.weight"):
        universal.read(written)


def change_states(step_folder: Path, change: Callable[[dict], object]) -> None:
    for file in universal.MODEL_STATES:
        states = torch.load(step_folder / file, weights_only=False)
        change(states)
        torch.save(states, step_folder / file)


def save_step(step_folder: Path, step: object) -> None:
    """Replaces a step of the optimizer that is read only if the folder does not tell it elsewhere."""
    change_states(step_folder, lambda states: states["megamtp"].update(state=None))
    torch.save(step, step_folder / "zero/embedding.weight/step.pt")


def share_step(step_folder: Path, shared: object) -> None:
    save_step(step_folder, None)
    (step_folder / "zero/embedding.weight/step.pt").unlink()
    torch.save(shared, step_folder / "zero/optimizer_state.pt")


DAMAGE = {
    "no tensors": (
        lambda folder: shutil.rmtree(folder / "zero"),
        "global_step9 has no folder zero with its tensors; copy it",
    ),
    "a file": (
        lambda folder: (shutil.rmtree(folder / "zero"), (folder / "zero").touch()),
        "has no folder zero with its tensors",
    ),
    "a number": (
        lambda folder: change_states(folder, lambda states: states.update(megamtp=3)),
        "megamtp is 3, expected a mapping that describes the model",
    ),
    "no model": (
        lambda folder: change_states(folder, lambda states: states["megamtp"].update(model=3)),
        "expected a mapping that describes the model; copy it again",
    ),
    "a word": (lambda folder: save_step(folder, "x"), r"weight/step\.pt has no step count \(invalid literal"),
    "a vector": (lambda folder: save_step(folder, torch.zeros(3)), r"weight/step\.pt has no step count"),
    "no list": (lambda folder: share_step(folder, 3), r"optimizer_state\.pt has no step count"),
    "no state": (
        lambda folder: share_step(folder, {"optimizer_state_dict": {"state": []}}),
        r"optimizer_state\.pt has no step count \(list index out of range\); convert the checkpoint again",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_in_one_line(damage, written):
    damage_folder, words = DAMAGE[damage]
    damage_folder(written / "global_step9")
    with pytest.raises(CheckpointError, match=words) as error:
        universal.read(written)
    assert "\n" not in str(error.value)


def test_weights_without_moments_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no optimizer state"):
        universal.write(contents(SMALL, random_model(SMALL).state_dict()), tmp_path / "universal")
    assert not (tmp_path / "universal").exists()
