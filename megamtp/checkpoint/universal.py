"""DeepSpeed's universal checkpoint, which its ZeRO-1, ZeRO-2, ZeRO-3, BF16 and pipeline engines load on any number of
ranks.

    FOLDER/latest_universal                         the name of the next folder
    FOLDER/global_step7/zero/NAME/fp32.pt           each parameter; beside it exp_avg.pt, exp_avg_sq.pt and step.pt
    FOLDER/global_step7/zero/optimizer_state.pt     what all parameters share
    FOLDER/global_step7/mp_rank_00_model_states.pt  counters, and under another name the same for ZeRO-3
    FOLDER/global_step7/tokenizer.model             if the source has one, which DeepSpeed passes over; or
    generation_config.json

    engine.load_checkpoint("FOLDER")      with {"checkpoint": {"load_universal": true}} in DeepSpeed's configuration

Source: deepspeed/checkpoint/ds_to_universal.py and universal_checkpoint.py; runtime/engine.py; runtime/zero/stage3.py.

Tests: tests/distributed/test_universal.py.
"""

import dataclasses
import importlib.metadata
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamtp.checkpoint import torch_file
from megamtp.checkpoint.contents import WEIGHT, Contents, check_contents, described_model, parameter_shapes, written_out
from megamtp.checkpoint.folder import name_in, published
from megamtp.checkpoint.hf_tokenizer import copied_tokenizer, copy_tokenizer
from megamtp.checkpoint.special_ids import read_special_ids, write_special_ids
from megamtp.checkpoint.state import COUNTERS, OptimizerState, RunState, read_state
from megamtp.checkpoint.tensors import InMemory
from megamtp.checkpoint.torch_file import Streamed
from megamtp.config import ModelConfig
from megamtp.errors import CheckpointError

LATEST = "latest_universal"
ZERO, SHARED, STEP = "zero", "optimizer_state.pt", "step.pt"
# ZeRO-3 looks for the second
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
WEIGHT_FILE = "fp32.pt"
OWN = "megamtp"  # what DeepSpeed does not know of a model, in MODEL_STATES; it returns it as client state
VERSION = 0.4  # of the format
CLASSES_OF = ("deepspeed.",)  # objects of these are passed over in its files


def write(contents: Contents, directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes the folder, which appears whole. Learning rate, decay and betas are the loading engine's own.

    Args:
        dtype: fp32, for nothing may be lost.

    Raises:
        CheckpointError: there is no optimizer state, the destination exists or cannot be written, there is no room, or
            a tensor is missing, misshaped or unknown.
    """
    if dtype != torch.float32:
        raise CheckpointError(f"a universal checkpoint is in fp32, not {dtype}; leave --dtype out")
    if not contents.has_optimizer_state:
        raise CheckpointError(
            "the source has no optimizer state, which a universal checkpoint needs; expected a run's checkpoint"
        )
    assert contents.state is not None
    check_contents(contents, "the checkpoint")
    num_bytes = sum(math.prod(shape) * 4 for source in contents.sources.values() for shape in source.shapes.values())
    step = torch.tensor(float(contents.state.optimizer.steps_of(0)))
    with published(directory, num_bytes) as folder:
        tag = f"global_step{contents.step}"
        (folder / LATEST).write_text(tag)
        for name in contents.weights.shapes:
            parameter = folder / tag / ZERO / name
            parameter.mkdir(parents=True)
            for kind in contents.kinds:
                torch_file.write(
                    parameter / _file(kind), {"param": Streamed(contents.sources[kind], name, dtype), "cat_dim": 0}
                )
            torch_file.write_small(parameter / STEP, step)
        torch_file.write_small(folder / tag / ZERO / SHARED, _shared(step, len(contents.weights.shapes)))
        for file in MODEL_STATES:
            torch_file.write_small(folder / tag / file, _model_states(contents))
        copy_tokenizer(contents, folder / tag)
        write_special_ids(folder / tag, contents.special_ids)


def read(directory: Path, model: ModelConfig | None = None) -> Contents:
    """Opens the folder, or one step's folder in it.

    Args:
        model: for a checkpoint that is not of our writing, and says nothing of its model.

    Raises:
        CheckpointError: a file is missing or unreadable, or a tensor is missing, misshaped or unknown.
    """
    folder = _step_folder(directory)
    states = _read_states(folder)
    own = states.get(OWN, {})
    if "model" in own:
        model = described_model(own["model"], folder)
    elif model is None:
        raise CheckpointError(f"{folder} says nothing of its model; expected --config with the run's config.yaml")
    shapes = parameter_shapes(model)
    _check_names(folder / ZERO, shapes)
    counters = {name: states.get(name, 0) for name in COUNTERS}
    state = (
        read_state(own["state"], folder)
        if own.get("state")
        else _adamw_state(folder / ZERO, next(iter(shapes)), counters)
    )
    return Contents(
        model,
        {kind: UniversalTensors(folder / ZERO, _file(kind), shapes) for kind in (WEIGHT, *state.optimizer.tensors)},
        step=own.get("step", counters["global_steps"]),
        state=state,
        sequence_length=own.get("sequence_length"),
        tokenizer=copied_tokenizer(folder),
        tokens_are_bytes=own.get("tokens_are_bytes", False),
        special_ids=read_special_ids(folder, model.vocab_size),
    )


class UniversalTensors:
    """A TensorSource over one file of each parameter's folder: tensors in their shape, or flat ones, as ZeRO-3 has
    them.

    Raises:
        CheckpointError: a file is missing or damaged, or its tensor misshaped.
    """

    def __init__(self, zero: Path, file: str, shapes: Mapping[str, tuple[int, ...]]):
        self.zero, self.file, self.shapes = zero, file, shapes
        for name in shapes:
            self._open(name)

    def read(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """See TensorSource.read."""
        return InMemory({name: self._open(name)}).read(name, start, end)

    def _open(self, name: str) -> Tensor:
        path, shape = self.zero / name / self.file, self.shapes[name]
        found = torch_file.read(path)
        tensor = found.get("param") if isinstance(found, dict) else found
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) not in (shape, (math.prod(shape),)):
            shown = list(tensor.shape) if isinstance(tensor, Tensor) else "no tensor"
            raise CheckpointError(f"{path}: tensor {name} has shape {shown}, expected {list(shape)}")
        torch_file.tensors_of(path, {name: tensor})
        return tensor


def _shared(step: Tensor, num_parameters: int) -> dict[str, Any]:
    """What the engines read from optimizer_state.pt. As many groups as any optimizer can have, none of which sets
    anything.
    """
    groups: list[dict[str, list[Tensor]]] = [{"params": []} for _ in range(num_parameters)]
    return {
        "param_groups": groups,
        "ds_version": importlib.metadata.version("deepspeed"),
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": groups},
    }


def _model_states(contents: Contents) -> dict[str, Any]:
    assert contents.state is not None
    shapes = {name: torch.Size(shape) for name, shape in contents.weights.shapes.items()}
    return {
        "module": {},
        "param_shapes": [shapes],
        "buffer_names": [],
        "optimizer": None,
        "lr_scheduler": None,
        "dp_world_size": 1,
        "mp_world_size": 1,
        **contents.state.counters,
        "ds_config": {},
        "ds_version": importlib.metadata.version("deepspeed"),
        "universal_checkpoint_info": {"universal_checkpoint_version": VERSION},
        OWN: {
            "model": dataclasses.asdict(written_out(contents.model)),
            "step": contents.step,
            "state": contents.state.saved(),
            "sequence_length": contents.sequence_length,
            "tokens_are_bytes": contents.tokens_are_bytes,
        },
    }


def is_universal(path: Path) -> bool:
    return (path / LATEST).exists() or (path / ZERO / SHARED).exists()


def _step_folder(directory: Path) -> Path:
    if not (directory / LATEST).exists():
        return directory
    folder = directory / name_in(directory / LATEST)
    if not folder.is_dir():
        raise CheckpointError(f"{directory / LATEST} names {folder.name}, which is not there; copy it again")
    return folder


def _read_states(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("*mp_rank_*_model_states.pt"))
    if not files:
        raise CheckpointError(f"{folder} has no {MODEL_STATES[0]}; copy it again")
    states = torch_file.read(files[0], CLASSES_OF)
    if not isinstance(states, dict):
        raise CheckpointError(f"{files[0]} holds a {type(states).__name__}, expected a mapping")
    own = states.get(OWN, {})
    if not isinstance(own, dict) or not isinstance(own.get("model", {}), dict):
        raise CheckpointError(
            f"{files[0]}: {OWN} is {str(own)[:100]}, expected a mapping that describes the model; copy it again"
        )
    return states


def _check_names(zero: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if not zero.is_dir():
        raise CheckpointError(f"{zero.parent} has no folder {ZERO} with its tensors; copy it again")
    found = {path.name for path in zero.iterdir() if path.is_dir()}
    for name, shape in shapes.items():
        if name not in found:
            raise CheckpointError(f"{zero} has no tensor {name}; expected one of shape {list(shape)}")
    for name in sorted(found):
        if name not in shapes:
            raise CheckpointError(f"{zero} has an unknown tensor {name}; expected only its model's {len(shapes)}")


def _file(kind: str) -> str:
    """Of a parameter, with its tensor of that kind."""
    return WEIGHT_FILE if kind == WEIGHT else f"{kind}.pt"


def _adamw_state(zero: Path, name: str, counters: dict[str, int]) -> RunState:
    """Of a checkpoint that another program wrote: AdamW's, as its files are named."""
    return RunState(OptimizerState("adamw", ("exp_avg", "exp_avg_sq"), (_read_step(zero, name),)), counters)


def _read_step(zero: Path, name: str) -> int:
    """Adam's steps, from a parameter's own file or, as of ZeRO-3, from the shared one."""
    own = zero / name / STEP
    file = own if own.exists() else zero / SHARED
    found = torch_file.read(file, CLASSES_OF)
    try:
        return int(found if file == own else found["optimizer_state_dict"]["state"][0]["step"])
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} has no step of the optimizer ({error}); convert the checkpoint again") from None
