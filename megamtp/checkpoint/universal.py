"""DeepSpeed's universal checkpoint, which DeepSpeed's engines load on any number of ranks.

    FOLDER/latest_universal                           the name of the step's folder
    FOLDER/global_step7/zero/NAME/fp32.pt             a parameter; beside it exp_avg.pt, exp_avg_sq.pt and step.pt
    FOLDER/global_step7/zero/optimizer_state.pt       the state that all parameters share
    FOLDER/global_step7/mp_rank_00_model_states.pt    counters; ZeRO-3 reads a copy with another name
    FOLDER/global_step7/tokenizer.model               a SentencePiece model, if the source has one; DeepSpeed ignores it
    FOLDER/global_step7/generation_config.json        ids of special tokens, if the source has another tokenizer

DeepSpeed's ZeRO-1, ZeRO-2, ZeRO-3, BF16 and pipeline engines load it by engine.load_checkpoint("FOLDER"), with
{"checkpoint": {"load_universal": true}} in the configuration.

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
from megamtp.checkpoint.contents import (
    WEIGHT,
    Contents,
    check_contents,
    model_from_fields,
    parameter_shapes,
    resolve_defaults,
)
from megamtp.checkpoint.folder import atomic_folder, read_name
from megamtp.checkpoint.hf_tokenizer import copy_tokenizer, find_tokenizer
from megamtp.checkpoint.special_ids import read_special_ids, write_special_ids
from megamtp.checkpoint.state import COUNTERS, OptimizerState, RunState, read_state
from megamtp.checkpoint.tensors import InMemory
from megamtp.checkpoint.torch_file import StreamedTensor
from megamtp.config import ModelConfig
from megamtp.errors import CheckpointError

LATEST = "latest_universal"
ZERO, SHARED, STEP = "zero", "optimizer_state.pt", "step.pt"
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")  # ZeRO-3 reads the second
WEIGHT_FILE = "fp32.pt"
OUR_KEY = "megamtp"  # our key in MODEL_STATES, for the model and the run's state; DeepSpeed returns it as client state
VERSION = 0.4  # version of DeepSpeed's format
OPAQUE = ("deepspeed.",)  # objects of classes in these modules are replaced by placeholders


def write(contents: Contents, directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes the folder atomically. It does not contain learning rate, weight decay and betas.

    Args:
        dtype: must be fp32, because the format is lossless.

    Raises:
        CheckpointError: there is no optimizer state, the destination exists or cannot be written, there is not enough
            space, or a tensor is missing, has a wrong shape, or is unknown.
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
    with atomic_folder(directory, num_bytes) as folder:
        tag = f"global_step{contents.step}"
        (folder / LATEST).write_text(tag)
        for name in contents.weights.shapes:
            parameter = folder / tag / ZERO / name
            parameter.mkdir(parents=True)
            for kind in contents.kinds:
                tensor = StreamedTensor(contents.sources[kind], name, dtype)
                torch_file.write(parameter / _file(kind), {"param": tensor, "cat_dim": 0})
            torch_file.write_small(parameter / STEP, step)
        torch_file.write_small(folder / tag / ZERO / SHARED, _shared(step, len(contents.weights.shapes)))
        for file in MODEL_STATES:
            torch_file.write_small(folder / tag / file, _model_states(contents))
        copy_tokenizer(contents, folder / tag)
        write_special_ids(folder / tag, contents.special_ids)


def read(directory: Path, model: ModelConfig | None = None) -> Contents:
    """Opens the folder, or the folder of one step.

    Args:
        model: needed for checkpoints of other programs, which do not describe the model.

    Raises:
        CheckpointError: a file is missing or unreadable, or a tensor is missing, has a wrong shape, or is unknown.
    """
    folder = _step_folder(directory)
    states = _read_states(folder)
    description = states.get(OUR_KEY, {})
    if "model" in description:
        model = model_from_fields(description["model"], folder)
    elif model is None:
        raise CheckpointError(f"{folder} does not describe its model; expected --config with the run's config.yaml")
    shapes = parameter_shapes(model)
    _check_names(folder / ZERO, shapes)
    counters = {name: states.get(name, 0) for name in COUNTERS}
    state = (
        read_state(description["state"], folder)
        if description.get("state")
        else _adamw_state(folder / ZERO, next(iter(shapes)), counters)
    )
    return Contents(
        model,
        {kind: UniversalTensors(folder / ZERO, _file(kind), shapes) for kind in (WEIGHT, *state.optimizer.tensors)},
        step=description.get("step", counters["global_steps"]),
        state=state,
        sequence_length=description.get("sequence_length"),
        tokenizer=find_tokenizer(folder),
        tokens_are_bytes=description.get("tokens_are_bytes", False),
        special_ids=read_special_ids(folder, model.vocab_size),
    )


class UniversalTensors:
    """A TensorSource over one file in each parameter's folder. Tensors may be flattened, as ZeRO-3 saves them.

    Raises:
        CheckpointError: a file is missing or damaged, or its tensor has a wrong shape.
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
        content = torch_file.read(path)
        tensor = content.get("param") if isinstance(content, dict) else content
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path} holds no tensor; expected {name} of shape {list(shape)}")
        if tuple(tensor.shape) not in (shape, (math.prod(shape),)):
            raise CheckpointError(f"{path}: tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        torch_file.require_tensors(path, {name: tensor})
        return tensor


def _shared(step: Tensor, num_parameters: int) -> dict[str, Any]:
    """Returns the part of optimizer_state.pt that the engines read."""
    # There are as many empty groups as an optimizer can have. Empty groups do not change the engine's settings.
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
        OUR_KEY: {
            "model": dataclasses.asdict(resolve_defaults(contents.model)),
            "step": contents.step,
            "state": contents.state.to_json(),
            "sequence_length": contents.sequence_length,
            "tokens_are_bytes": contents.tokens_are_bytes,
        },
    }


def is_universal(path: Path) -> bool:
    """Returns whether this is a universal checkpoint, or the folder of one of its steps."""
    return (path / LATEST).exists() or (path / ZERO / SHARED).exists()


def _step_folder(directory: Path) -> Path:
    if not (directory / LATEST).exists():
        return directory
    folder = directory / read_name(directory / LATEST)
    if not folder.is_dir():
        raise CheckpointError(f"{directory / LATEST} names {folder.name}, which does not exist; copy it again")
    return folder


def _read_states(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("*mp_rank_*_model_states.pt"))
    if not files:
        raise CheckpointError(f"{folder} has no {MODEL_STATES[0]}; copy it again")
    states = torch_file.read(files[0], OPAQUE)
    if not isinstance(states, dict):
        raise CheckpointError(f"{files[0]} holds a {type(states).__name__}, expected a mapping")
    description = states.get(OUR_KEY, {})
    if not isinstance(description, dict) or not isinstance(description.get("model", {}), dict):
        raise CheckpointError(
            f"{files[0]}: {OUR_KEY} is {str(description)[:100]}, expected a mapping that describes the model; copy it "
            "again"
        )
    return states


def _check_names(zero: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if not zero.is_dir():
        raise CheckpointError(f"{zero.parent} has no folder {ZERO} with its tensors; copy it again")
    names = {path.name for path in zero.iterdir() if path.is_dir()}
    for name, shape in shapes.items():
        if name not in names:
            raise CheckpointError(f"{zero} has no tensor {name}; expected one of shape {list(shape)}")
    for name in sorted(names):
        if name not in shapes:
            raise CheckpointError(
                f"{zero} has an unknown tensor {name}; expected only the {len(shapes)} tensors of its model"
            )


def _file(kind: str) -> str:
    """Returns the name of a parameter's file with the tensor of this kind."""
    return WEIGHT_FILE if kind == WEIGHT else f"{kind}.pt"


def _adamw_state(zero: Path, name: str, counters: dict[str, int]) -> RunState:
    """Returns the state of a checkpoint that another program wrote. Its file names are those of Adam's moments."""
    return RunState(OptimizerState("adamw", ("exp_avg", "exp_avg_sq"), (_read_step(zero, name),)), counters)


def _read_step(zero: Path, name: str) -> int:
    """Returns Adam's step count, from a parameter's own file or, for ZeRO-3, from the shared file."""
    own_file = zero / name / STEP
    file = own_file if own_file.exists() else zero / SHARED
    content = torch_file.read(file, OPAQUE)
    try:
        return int(content if file == own_file else content["optimizer_state_dict"]["state"][0]["step"])
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} has no step count ({error}); convert the checkpoint again") from None
