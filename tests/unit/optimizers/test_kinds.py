"""The optimizer kinds that `optimizer.kind` names."""

import pytest

from megamtp.config import OptimizerConfig
from megamtp.errors import InputError
from megamtp.optimizers.adamw import AdamW
from megamtp.optimizers.base import OptimizerKind
from megamtp.optimizers.kinds import OPTIMIZERS, optimizer_kind


class UserOptimizer(OptimizerKind):
    """A user-defined optimizer kind."""


def test_a_name_selects_a_built_in_or_a_user_defined_kind():
    assert optimizer_kind(OptimizerConfig(kind="adamw")) is AdamW
    assert optimizer_kind(OptimizerConfig(kind=f"{__name__}:UserOptimizer")) is UserOptimizer


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("adam", f"optimizer.kind=adam; expected {' or '.join(OPTIMIZERS)}, or MODULE:CLASS of your own"),
        ("torch.optim:AdamW", "expected a subclass of megamtp.optimizers.base:OptimizerKind"),
    ],
)
def test_other_names_raise_an_input_error(kind, words):
    with pytest.raises(InputError) as error:
        optimizer_kind(OptimizerConfig(kind=kind))
    assert words in str(error.value)
