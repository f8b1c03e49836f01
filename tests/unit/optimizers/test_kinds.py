"""The kind of optimizer that a setting names."""

import pytest

from megamtp.config import OptimizerConfig
from megamtp.errors import InputError
from megamtp.optimizers.adamw import AdamW
from megamtp.optimizers.base import OptimizerKind
from megamtp.optimizers.kinds import OPTIMIZERS, optimizer_kind


class Own(OptimizerKind):
    """A kind of a user's own."""


def test_a_kind_is_built_in_or_a_users_own():
    assert optimizer_kind(OptimizerConfig(kind="adamw")) is AdamW
    assert optimizer_kind(OptimizerConfig(kind=f"{__name__}:Own")) is Own


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("adam", f"optimizer.kind=adam; expected {' or '.join(OPTIMIZERS)}, or MODULE:CLASS of your own"),
        ("torch.optim:AdamW", "expected a subclass of megamtp.optimizers.base:OptimizerKind"),
    ],
)
def test_other_names_are_refused(kind, words):
    with pytest.raises(InputError) as error:
        optimizer_kind(OptimizerConfig(kind=kind))
    assert words in str(error.value)
