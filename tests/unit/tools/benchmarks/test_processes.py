"""Function calls in new processes."""

import argparse
import math
import os

import pytest
from benchmarks import output, processes

from megamtp.errors import InputError


def test_a_new_process_returns_a_result_or_an_error():
    first, second = processes.Fresh(os.getpid), processes.Fresh(os.getpid)
    assert len({first.result(), second.result(), os.getpid()}) == 3
    with pytest.raises(InputError, match="no GPU"):
        processes.Fresh(output.start, argparse.Namespace(smoke=False)).result()
    for failing in (processes.Fresh(math.sqrt, -1), processes.Fresh(os._exit, 1)):
        with pytest.raises(RuntimeError, match="ended with status 1"):
            failing.result()
