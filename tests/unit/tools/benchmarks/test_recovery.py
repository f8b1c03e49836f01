"""tools/benchmarks/recovery.py refuses wrong options before it trains."""

import pytest
from benchmarks import recovery

from megamtp.errors import InputError


def test_steps_out_of_order_are_refused(tmp_path):
    with pytest.raises(
        InputError, match="--save-every 200 --kill-at 100 --steps 1000; expected save-every < kill-at < steps"
    ):
        recovery.main(["--data", str(tmp_path), "--kill-at", "100"])


def test_an_existing_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--run .* exists; expected a new folder"):
        recovery.main(["--data", str(tmp_path), "--run", str(tmp_path)])
