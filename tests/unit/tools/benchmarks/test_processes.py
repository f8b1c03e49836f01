"""Function calls in new processes."""

import argparse
import math
import os

import pytest
from benchmarks import output, processes

from megamtp.errors import InputError


def test_a_new_process_returns_a_result_or_an_error():
    first, second = processes.ProcessCall(os.getpid), processes.ProcessCall(os.getpid)
    assert len({first.run(), second.run(), os.getpid()}) == 3
    with pytest.raises(InputError, match="no GPU"):
        processes.ProcessCall(output.require_gpu, argparse.Namespace(smoke=False)).run()
    for failing in (processes.ProcessCall(math.sqrt, -1), processes.ProcessCall(os._exit, 1)):
        with pytest.raises(RuntimeError, match="ended with status 1"):
            failing.run()


def test_a_module_of_megamtp_or_benchmarks_runs_with_a_log(tmp_path, monkeypatch):
    """Arguments reach the module, variables its environment, and output of several calls the log."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "shows.py").write_text(
        "import importlib.util, os, sys\n"
        "assert importlib.util.find_spec('benchmarks.learning')\n"
        "print(os.environ['NUMBER'], *sys.argv[1:])\n"
        "sys.exit('failed' if sys.argv[1:] == ['fail'] else 0)\n"
    )
    log = tmp_path / "run/log.txt"
    processes.call("shows", "one", "two", log=log, environment={"NUMBER": "7"})
    with pytest.raises(InputError, match=f"^shows ended with status 1; expected 0: fix the error in {log}, then"):
        processes.call("shows", "fail", log=log, environment={"NUMBER": "8"})
    assert log.read_text() == "7 one two\n8 fail\nfailed\n"


def test_a_module_prints_without_a_log(capfd):
    processes.call("platform", "--terse")
    assert capfd.readouterr().out
    with pytest.raises(
        InputError, match=r"^megamtp.absent ended with status 1; expected 0: fix the error that it printed"
    ):
        processes.call("megamtp.absent")
    assert "No module named megamtp.absent" in capfd.readouterr().err
