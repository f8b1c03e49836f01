"""The contents of a checkpoint: every format's reader returns them, and every format's writer takes them."""

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

# Older checkpoints lack these fields of the model, which then have their defaults.
ADDED_FIELDS = ("head_kind", "first_head", "chain_form", "chain_weights", "unembedding", "match_parameters")


@dataclass(frozen=True)
class Contents:
    """A model and its training state. Tensors stay on disk until they are read.

    Attributes:
        sources: tensors by MTPModel's parameter names, for WEIGHT and, if available, each kind of optimizer tensor.
        step: optimizer steps taken; None if unknown.
        state: the state besides tensors; None if unknown.
        sequence_length: the number of positions in a training window; None if unknown.
        tokenizer: path of a SentencePiece model, if there is one.
        tokens_are_bytes: the tokenizer is `bytes`.
        special_ids: ids of the tokens that begin and end a text, such as {"eos_token_id": 2}. Set only if the source
            has a tokenizer that is not a SentencePiece model.
        notes: lines that tell the user about changes made by reading.
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
        """Resolves the defaults of the model, so that equal models have equal configurations."""
        object.__setattr__(self, "model", resolve_defaults(self.model))

    @property
    def kinds(self) -> tuple[str, ...]:
        """WEIGHT and, if available, the kinds of optimizer tensors."""
        return (WEIGHT, *(self.state.optimizer.tensors if self.state and self.has_optimizer_state else ()))

    @property
    def has_optimizer_state(self) -> bool:
        """Whether a run can resume from this checkpoint."""
        return (
            self.state is not None and self.step is not None and set(self.state.optimizer.tensors) <= set(self.sources)
        )

    @property
    def weights(self) -> TensorSource:
        """The source of the parameters."""
        return self.sources[WEIGHT]

    @property
    def has_end_of_text(self) -> bool:
        """Whether the token that ends a text is known."""
        return bool(self.tokenizer) or self.tokens_are_bytes or "eos_token_id" in self.special_ids


def resolve_defaults(model: ModelConfig) -> ModelConfig:
    """Returns the same model with explicit values instead of None."""
    chain_weights = model.chain_weights
    if model.head_kind == "chained":
        chain_weights = "shared" if model.shares_chain_weights else "own"
    return dataclasses.replace(
        model, num_key_value_heads=model.key_value_heads, mlp_dim=model.hidden_dim, chain_weights=chain_weights
    )


def positive_integer(settings: Mapping[str, Any], key: str, where: Path) -> int:
    """Returns an integer from the file `where`. Raises CheckpointError if it is missing or not a positive integer."""
    value = settings.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{where}: {key} is {value!r}; expected a whole number of at least 1: correct it")
    return value


def check_model(model: ModelConfig, where: Path) -> ModelConfig:
    """Returns `model` unchanged. Raises CheckpointError if its settings, from the file `where`, are invalid."""
    for field in dataclasses.fields(ModelConfig):
        value = getattr(model, field.name)
        # A whole number is a valid float, and a bool is an int in Python. `check` finds numbers instead of text.
        if isinstance(value, bool) != (field.type is bool) or not isinstance(value, field.type | int):
            kinds: dict[Any, str] = {bool: "true or false", str: "text", str | None: "text or null"}
            expected = kinds.get(field.type, "a number")
            raise CheckpointError(f"{where}: model.{field.name} is {value!r}; expected {expected}: correct it")
    try:
        model.check("model")
    except InputError as error:
        raise CheckpointError(f"{where}: {error}") from None
    return model


def model_from_fields(settings: Mapping[str, Any], where: Path) -> ModelConfig:
    """Returns the model with these fields, from the file `where`.

    Raises:
        CheckpointError: a field is missing, unknown or invalid.
    """
    defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    settings = {**{name: defaults[name] for name in ADDED_FIELDS}, **settings}
    for name in sorted(defaults.keys() ^ settings.keys()):
        raise CheckpointError(f"{where}: model.{name} is missing or unknown; expected {sorted(defaults)}")
    return check_model(ModelConfig(**settings), where)


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all parameters of MTPModel, by name, in MTPModel's order."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in MTPModel(model).named_parameters()}


def check_tensors(
    shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: Path | str
) -> None:
    """Compares shapes by tensor name.

    Raises:
        CheckpointError: a tensor is missing, has a wrong shape, or is unknown.
    """
    for name, shape in expected.items():
        if name not in shapes:
            raise CheckpointError(f"{where} has no tensor {name}; expected one of shape {list(shape)}")
        if shapes[name] != shape:
            raise CheckpointError(f"{where}: tensor {name} has shape {list(shapes[name])}, expected {list(shape)}")
    for name in shapes:
        if name not in expected:
            raise CheckpointError(
                f"{where} has an unknown tensor {name}; expected only the {len(expected)} tensors of its configuration"
            )


def check_contents(contents: Contents, where: Path | str) -> None:
    """Compares the tensors of all kinds with the model's parameters.

    Raises:
        CheckpointError: a tensor is missing, has a wrong shape, or is unknown.
    """
    expected = parameter_shapes(contents.model)
    for kind, source in contents.sources.items():
        check_tensors(source.shapes, expected, where if kind == WEIGHT else f"{where} ({kind})")


def require_head_kinds(
    contents: Contents, format_name: str, kinds: tuple[str, ...] = ("parallel",), may_be_replicated: bool = False
) -> None:
    """Raises CheckpointError if the format cannot hold the model's heads or unembeddings.

    Args:
        kinds: of heads that the format can hold.
        may_be_replicated: whether it can hold an unembedding of each head.
    """
    kind = contents.model.head_kind
    if kind not in kinds:
        raise CheckpointError(
            f"{format_name} cannot hold heads of the kind {kind}; expected model.head_kind={' or '.join(kinds)}: use "
            "canonical"
        )
    if contents.model.unembedding == "replicated" and not may_be_replicated:
        raise CheckpointError(
            f"{format_name} cannot hold an unembedding of each head; expected model.unembedding=shared: use canonical"
        )


@dataclass(frozen=True)
class Rows:
    """Selects rows of a tensor.

    Attributes:
        name: the tensor's name in the source.
        rows: int64 [number of rows], their indices; None: all rows.
    """

    name: str
    rows: Tensor | None = None


class Rearranged:
    """A TensorSource whose tensors are selected rows of another source's tensors.

    Args:
        tensors: {new name: Rows}.
    """

    def __init__(self, source: TensorSource, tensors: Mapping[str, Rows]):
        self.source, self.tensors = source, tensors
        self.shapes = {}
        for name, selection in tensors.items():
            shape = source.shapes[selection.name]
            self.shapes[name] = shape if selection.rows is None else (len(selection.rows), *shape[1:])

    def read(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """See TensorSource.read. Adjacent rows of the source are read together."""
        selection, shape = self.tensors[name], self.shapes[name]
        if selection.rows is None:
            return self.source.read(selection.name, start, end)
        width = torch.Size(shape[1:]).numel()
        start, end, _ = slice(start, end).indices(len(selection.rows) * width)
        first = start // width
        rows = selection.rows[first : -(-end // width)]
        if not len(rows):
            return self.source.read(selection.name, 0, 0)
        breaks = ((rows[1:] != rows[:-1] + 1).nonzero().flatten() + 1).tolist()
        ranges = zip([0, *breaks], [*breaks, len(rows)], strict=True)
        slices = [
            self.source.read(selection.name, int(rows[begin]) * width, (int(rows[stop - 1]) + 1) * width)
            for begin, stop in ranges
        ]
        return torch.cat(slices)[start - first * width : end - first * width]


def rename_tensors(source: TensorSource, names: Mapping[str, str]) -> Rearranged:
    """Returns `source` with other names for its tensors: {new name: name in the source}."""
    return Rearranged(source, {new: Rows(old) for new, old in names.items()})
