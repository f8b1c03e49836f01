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
