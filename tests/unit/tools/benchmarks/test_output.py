"""Files that all benchmarks write."""

import json
import sys

import pytest
from benchmarks import output

from megamtp.errors import InputError
from tests.measurements import options


def test_a_file_instead_of_the_output_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--output .*file: File exists; expected a folder"):
        output.make_folder(options(tmp_path / "file"))


def test_both_files_have_the_given_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "loss"])
    figure, (axes,) = output.figure(4, 3)
    output.bars(axes, ["a", "b"], {"one": {"a": 1.0, "b": 2.0}, "other": {"b": 3.0}})
    assert [round(bar.get_height()) for bar in axes.patches] == [1, 2, 3]
    output.write(options(tmp_path, "--name", "sms16"), {"SMs held": 16}, [{"n": 1}], "the table", figure)
    assert {path.name for path in tmp_path.iterdir()} == {"sms16.json", "sms16.png"}
    assert json.loads((tmp_path / "sms16.json").read_text())["settings"] == {"SMs held": 16}
    assert "; SMs held 16\n\nthe table\n\n`python tools/benchmark.py loss`" in capsys.readouterr().out
