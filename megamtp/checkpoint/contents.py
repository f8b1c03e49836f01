"""What a checkpoint of any format holds, once it is opened: what every reader returns and every writer takes."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamtp.checkpoint.state import RunState
from megamtp.checkpoint.tensors import WEIGHT, TensorSource
from megamtp.config import ModelConfig
from megamtp.errors import CheckpointError, InputError
from megamtp.model.mtp import MTPModel


@dataclass(frozen=True)
class Contents:
    """A model and its state, on disk until it is read.

    Attributes:
        sources: by kind, WEIGHT and perhaps the optimizer's tensors: every parameter by MTPModel's names.
        step: optimizer steps taken; None if unknown.
        state: the rest of a run's state; None if unknown.
        sequence_length: positions of a training window; None if unknown.
        tokenizer: a SentencePiece model.
        tokens_are_bytes: there is no such model, since data.tokenizer is bytes.
        special_ids: what generation_config.json says of the tokens that begin and end a text, such as {"eos_token_id":
            2}, of a source with a tokenizer of another kind.
        notes: what a user should know of how it was read, one line each.
    """

    model: ModelConfig
    sources: Mapping[str, TensorSource]
    step: int | None = None
    state: RunState | None = None
    sequence_length: int | None = None
    tokenizer: Path | None = None
    tokens_are_bytes: bool = False
    special_ids: Mapping[str, int | list[int]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Writes out what the model's configuration leaves to its defaults, so that equal models have equal ones."""
        object.__setattr__(self, "model", written_out(self.model))

    @property
    def kinds(self) -> tuple[str, ...]:
        """WEIGHT and, if they are there, the optimizer's tensors."""
        return (WEIGHT, *(self.state.optimizer.tensors if self.state and self.has_optimizer_state else ()))

    @property
    def has_optimizer_state(self) -> bool:
        """Whether a run can go on with it."""
        return (
            self.state is not None and self.step is not None and set(self.state.optimizer.tensors) <= set(self.sources)
        )

    @property
    def weights(self) -> TensorSource:
        return self.sources[WEIGHT]

    @property
    def ends_texts(self) -> bool:
        """Whether it is known which token ends a text."""
        return bool(self.tokenizer) or self.tokens_are_bytes or "eos_token_id" in self.special_ids


def written_out(model: ModelConfig) -> ModelConfig:
    """The same model with its derived numbers given."""
    return dataclasses.replace(model, num_key_value_heads=model.key_value_heads, mlp_dim=model.hidden_dim)


def whole_number(settings: Mapping[str, Any], key: str, where: Path) -> int:
    """A number that the file `where` gives. Raises: CheckpointError if it is missing or not a whole one above 0."""
    value = settings.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{where}: {key} is {value!r}; expected a whole number, at least 1: mend it")
    return value


def checked_model(model: ModelConfig, where: Path) -> ModelConfig:
    """The same. Raises: CheckpointError if its numbers, from the file `where`, are no model's."""
    for field in dataclasses.fields(ModelConfig):
        value = getattr(model, field.name)
        if isinstance(value, bool) or not isinstance(value, field.type | int):
            raise CheckpointError(f"{where}: model.{field.name} is {value!r}; expected a number: mend it")
    try:
        model.check("model")
    except InputError as error:
        raise CheckpointError(f"{where}: {error}") from None
    return model


def described_model(settings: Mapping[str, Any], where: Path) -> ModelConfig:
    """The model of which the file `where` has every field. Raises: CheckpointError if it has others, or wrong ones."""
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    settings = {"head_kind": "parallel", **settings}  # megamtp 0.1 knew no other kind and did not name it
    for name in sorted(names.symmetric_difference(settings)):
        raise CheckpointError(f"{where}: model.{name} is missing or unknown; expected {sorted(names)}")
    return checked_model(ModelConfig(**settings), where)


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of every parameter of MTPModel, by name, in its order."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in MTPModel(model).named_parameters()}


def check_tensors(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: Path | str
) -> None:
    """Raises: CheckpointError if a tensor is missing, misshaped or unknown."""
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(f"{where} has no tensor {name}; expected one of shape {list(shape)}")
        if found[name] != shape:
            raise CheckpointError(f"{where}: tensor {name} has shape {list(found[name])}, expected {list(shape)}")
    for name in found:
        if name not in expected:
            raise CheckpointError(
                f"{where} has an unknown tensor {name}; expected only its configuration's {len(expected)}"
            )


def check_contents(contents: Contents, where: Path | str) -> None:
    """Raises: CheckpointError if any kind of state lacks a parameter's tensor, or has another."""
    expected = parameter_shapes(contents.model)
    for kind, source in contents.sources.items():
        check_tensors(source.shapes, expected, where if kind == WEIGHT else f"{where} ({kind})")


def require_parallel_heads(contents: Contents, form: str) -> None:
    """Raises: CheckpointError if the format `form`, whose heads are transformer layers, cannot hold this model's."""
    kind = contents.model.head_kind
    if kind != "parallel":
        raise CheckpointError(
            f"{form} cannot hold heads of the kind {kind}; expected model.head_kind=parallel: use canonical"
        )


@dataclass(frozen=True)
class Rows:
    """Rows of a source's tensor: all of them, or those at the indices `rows` [number of rows], int64."""

    name: str
    rows: Tensor | None = None


class Rearranged:
    """A TensorSource whose tensors are rows of another's, under other names: {name: Rows}."""

    def __init__(self, source: TensorSource, tensors: Mapping[str, Rows]):
        self.source, self.tensors = source, tensors
        self.shapes = {}
        for name, taken in tensors.items():
            shape = source.shapes[taken.name]
            self.shapes[name] = shape if taken.rows is None else (len(taken.rows), *shape[1:])

    def read(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """See TensorSource.read. Rows that follow each other in the source are read together."""
        taken, shape = self.tensors[name], self.shapes[name]
        if taken.rows is None:
            return self.source.read(taken.name, start, end)
        width = torch.Size(shape[1:]).numel()
        start, end, _ = slice(start, end).indices(len(taken.rows) * width)
        first = start // width
        rows = taken.rows[first : -(-end // width)]
        if not len(rows):
            return self.source.read(taken.name, 0, 0)
        breaks = ((rows[1:] != rows[:-1] + 1).nonzero().flatten() + 1).tolist()
        runs = zip([0, *breaks], [*breaks, len(rows)], strict=True)
        parts = [
            self.source.read(taken.name, int(rows[begin]) * width, (int(rows[stop - 1]) + 1) * width)
            for begin, stop in runs
        ]
        return torch.cat(parts)[start - first * width : end - first * width]


def renamed(source: TensorSource, names: Mapping[str, str]) -> Rearranged:
    """`source` under other names: {new name: its name there}."""
    return Rearranged(source, {new: Rows(old) for new, old in names.items()})
