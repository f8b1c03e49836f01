"""Head kinds and optimizer kinds in a user's module."""

import pytest

from megamtp.errors import InputError
from megamtp.extensions import find_kind


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("def (", "SyntaxError: invalid syntax"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("raise RuntimeError('no device')", "RuntimeError: no device"),
    ],
)
def test_a_module_that_raises_on_import_is_refused(content, problem, tmp_path, monkeypatch):
    (tmp_path / "broken_kind.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError) as caught:
        find_kind("broken_kind:Head", {}, object, "model.head_kind")
    message = str(caught.value)
    assert message.startswith(f"model.head_kind=broken_kind:Head cannot be imported ({problem}")
    assert message.endswith("; expected a module that imports without errors")
